"""A vocoder of several speakers: who they are, that each is heard, and that one voice is what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from echox import cli
from echox.engine.checkpoint.manifest import list_checkpoints, read_manifest
from echox.engine.checkpoint.recipe_diff import refused_changes
from echox.engine.context import LocalContext
from echox.errors import CheckpointError, DataError, MissingModelError
from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.speak.vocoder import CodeHifiGan, load_vocoder
from echox.stream.format.writer import write_shards
from echox.vocoder.data import VoiceCollate, held_out, open_voice, speakers_of_voice
from echox.vocoder.generator import Generator
from echox.vocoder.losses import LogMel, mel_loss
from echox.vocoder.recipe import VoiceRecipe
from echox.vocoder.samples import PAGE
from echox.vocoder.shape import HifiGanShape, write_vocoder
from echox.vocoder.state import recorded_speakers
from echox.vocoder.trainer import train_voice
from tests.vocoder import toy
from tests.vocoder.runs import losses_of, run_in, trained_state

VOICES = {"zoe": toy.Voice(100.0, 0.02), "bo": toy.Voice(330.0, 0.2)}
TABLE = "generator.net.speaker_embedding.weight"


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_voices(tmp_path_factory.mktemp("voices") / "train", VOICES)


def test_the_speakers_are_those_of_the_datasets_by_name(voices: Path, tmp_path: Path) -> None:
    more = toy.write_voices(tmp_path / "more", {"ann": toy.ORDINARY, "bo": toy.ORDINARY}, 1)
    sources = open_voice([str(voices), str(more)])
    assert speakers_of_voice(sources) == ("ann", "bo", "zoe") == speakers_of_voice(sources[::-1])
    began = ("zoe", "bo", "ann", "who left")
    assert speakers_of_voice(sources, began) == began, "rows stay those that the run began with"
    with pytest.raises(DataError, match="speaker 'ann' is not one of the 2 that the run began with"):
        speakers_of_voice(sources, ("bo", "zoe"))


def test_a_sample_that_does_not_say_who_speaks_is_refused(tmp_path: Path) -> None:
    named = toy.sample("a", *toy.clip(0), speaker="bo")
    write_shards(tmp_path / "set", [named, *(toy.sample(name, *toy.clip(1)) for name in "bc")])
    recipe = toy.recipe(tmp_path / "set", tmp_path, generator__speaker=4, generator__units=5)
    with LocalContext(tmp_path) as context, pytest.raises(DataError) as raised:
        train_voice(recipe, context)
    assert raised.value.what == f"2 of the 3 samples of {tmp_path / 'set'} do not say who speaks, the first is b"
    assert "generator.speaker=0" in raised.value.fix and "echox shards index" in raised.value.fix


def collate(speakers: tuple[str, ...] = ("bo", "zoe")) -> VoiceCollate:
    return VoiceCollate(5, 8, 0, 16_000, speakers)


def test_a_clip_comes_with_the_row_of_its_speaker(voices: Path) -> None:
    clips = held_out(str(voices), collate(), 8)
    assert [clip.id for clip in clips[:3]] == ["zoe-0", "bo-0", "zoe-1"], "each is heard before any is heard again"
    assert [clip.speaker for clip in clips] == [1, 0] * 4
    assert collate().join(clips, 0).speakers_B.tolist() == [1, 0] * 4
    assert [clip.id for clip in held_out(str(voices), collate(("bo",)), 8)] == [f"bo-{seed}" for seed in range(4)]
    with pytest.raises(DataError, match="can be spoken: nobody speaks there whom it is trained on"):
        held_out(str(voices), collate(("ann",)), 8)
    assert [clip.speaker for clip in held_out(str(voices), collate(()), 8)] == [0] * 8


def test_a_gradient_reaches_the_rows_of_those_who_spoke_and_no_other() -> None:
    torch.manual_seed(1)
    config = toy.recipe(Path("voice"), Path("runs"), generator__speaker=6).generator
    made = Generator(config.shape(5, 4))
    assert made.net.speaker_embedding.weight.shape == (4, 6)
    frames_BT, speakers_B = torch.randint(0, 5, (3, 8)), torch.tensor([2, 0, 2])
    wave_BN = made.speak(frames_BT, speakers_B)
    wave_BN[0].square().sum().backward()
    assert made.net.speaker_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [2]
    made.zero_grad()
    made.speak(frames_BT, speakers_B).square().sum().backward()
    assert made.net.speaker_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 2]
    # By hand: the speaker's vector behind that of each unit.
    vectors_BTD = torch.cat(
        [
            made.net.unit_embedding.weight[frames_BT],
            made.net.speaker_embedding.weight[speakers_B][:, None].repeat(1, 8, 1),
        ],
        2,
    )
    torch.testing.assert_close(wave_BN, made.net.hifi_gan(vectors_BTD.transpose(1, 2)), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def learnt(voices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps by the command."""
    folder = tmp_path_factory.mktemp("learnt")
    changes: dict[str, Any] = {
        "optim__steps": 12,
        "optim__lr": 1e-2,
        "checkpoint_every": 0,
        "samples": 2,
        "data__valid": str(voices),
    }
    changes |= {"data__micro_batch": 4}
    tree = toy.recipe_tree(voices, folder / "runs", generator__speaker=8, **changes)
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    assert cli.main(["vocoder", "train", str(folder / "recipe.yaml")]) == 0
    return folder / "runs" / "toy"


def test_each_speaker_sounds_as_it_does_in_the_corpus(learnt: Path, voices: Path) -> None:
    log_mel = LogMel(16_000)
    heard = {name: load_vocoder(learnt / "vocoder", name) for name in VOICES}
    for clip in held_out(str(voices), collate(), 8):
        own, other = ("bo", "zoe") if clip.speaker == 0 else ("zoe", "bo")
        apart = {}
        for name in (own, other):
            (wave,) = heard[name]([clip.units.astype(np.uint16)], [clip.durations.astype(np.uint16)])
            apart[name] = float(mel_loss(*(log_mel(torch.from_numpy(each)[None]) for each in (clip.wave, wave))))
        assert apart[own] < 0.8 * apart[other], (clip.id, apart)


def test_names_and_rows_are_in_the_folder_and_in_the_checkpoint(learnt: Path) -> None:
    config = json.loads((learnt / "vocoder" / "config.json").read_text())
    assert config["speaker_id_map"] == {"bo": 0, "zoe": 1}
    assert (config["vocoder_num_spkrs"], config["spkr_embed_dim"]) == (2, 8)
    (checkpoint,) = list_checkpoints(learnt)
    assert read_manifest(checkpoint)["speakers"] == ["bo", "zoe"]
    table_SD = load_file(learnt / "vocoder" / "model.safetensors")["speaker_embedding.weight"]
    assert torch.equal(table_SD, trained_state(learnt)[TABLE]) and table_SD.shape == (2, 8)


def test_samples_are_spoken_by_their_own_speakers(learnt: Path, voices: Path) -> None:
    from echox.audio.io import read_audio

    page = (learnt / "samples" / PAGE).read_text()
    assert "<h2>zoe-0 (zoe)</h2>" in page and "<h2>bo-0 (bo)</h2>" in page
    for number, clip in enumerate(held_out(str(voices), collate(), 2)):
        spoken = read_audio(learnt / "samples" / "step-00000012" / f"spoken-{number:02d}.wav")
        own, other = (
            load_vocoder(learnt / "vocoder", str(row))(
                [clip.units.astype(np.uint16)], [clip.durations.astype(np.uint16)]
            )[0]
            for row in (clip.speaker, 1 - clip.speaker)
        )
        assert np.abs(spoken - own).max() < 1e-3 < np.abs(spoken - other).max()


UNITS = np.resize(np.array([1, 3, 0, 2, 4], np.uint16), 40)


def test_swapped_rows_are_swapped_voices(learnt: Path, tmp_path: Path) -> None:
    weights = load_file(learnt / "vocoder" / "model.safetensors")
    weights["speaker_embedding.weight"] = weights["speaker_embedding.weight"].flip(0).contiguous()
    (tmp_path / "config.json").write_bytes((learnt / "vocoder" / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    waves = {name: load_vocoder(learnt / "vocoder", name)([UNITS])[0] for name in VOICES}
    assert np.abs(waves["bo"] - waves["zoe"]).max() > 0.01
    for name, other in (("bo", "zoe"), ("zoe", "bo")):
        assert np.array_equal(load_vocoder(tmp_path, name)([UNITS])[0], waves[other])


@pytest.mark.parametrize("speaker", ["bo", "zoe"])
def test_a_speaker_streams_as_the_whole_and_as_transformers_speaks(learnt: Path, speaker: str) -> None:
    vocoder = load_vocoder(learnt / "vocoder", speaker)
    assert isinstance(vocoder, CodeHifiGan) and vocoder.speaker == ("bo", "zoe").index(speaker)
    (wave,) = vocoder([UNITS])
    for size in (1, 3, 40):
        stream = vocoder.stream()
        pieces = [stream.push(UNITS[start : start + size]) for start in range(0, 40, size)]
        assert np.array_equal(np.concatenate([*pieces, stream.close()]), wave), size
    ids_11, first_11 = torch.tensor([[vocoder.speaker]]), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        expected, _ = vocoder.model(torch.from_numpy(UNITS.astype(np.int64))[None], ids_11, first_11)
    np.testing.assert_allclose(wave, expected.reshape(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("speaker", "said", "fix"),
    [
        ("zoo", "The vocoder has no speaker 'zoo'; its 2 speakers are 'bo', 'zoe'", "did you mean 'zoe'?"),
        ("2", "no speaker '2'", "name one of them, or a number from 0 to 1"),
        ("-1", "no speaker '-1'", "a number from 0 to 1"),
        ("9" * 5000, "no speaker '999", "a number from 0 to 1"),
        ("", "no speaker ''", "a number from 0 to 1"),
    ],
)
def test_an_unknown_speaker_is_one_sentence(learnt: Path, speaker: str, said: str, fix: str) -> None:
    with pytest.raises(DataError) as raised:
        load_vocoder(learnt / "vocoder", speaker)
    assert said in raised.value.what and fix in raised.value.fix and len(str(raised.value)) < 400


def test_a_speaker_goes_by_name_or_by_number(tmp_path: Path) -> None:
    shape = HifiGanShape(units=5, embedding=8, speaker=4, speakers=3, channels=32)
    weights = shape.build().state_dict()

    def row(speaker: str | None) -> int:
        vocoder = load_vocoder(tmp_path, speaker)
        assert isinstance(vocoder, CodeHifiGan)
        return vocoder.speaker

    write_vocoder(tmp_path, shape, weights, None, ["19", "2", "bo"])
    assert [row(each) for each in (None, "19", "2", "bo", "0", "1")] == [0, 0, 1, 2, 0, 1], (
        "a name goes before a number"
    )
    write_vocoder(tmp_path, shape, weights, None)
    assert [row(each) for each in (None, "0", "2")] == [0, 0, 2]
    with pytest.raises(DataError, match="its 3 speakers are 0 to 2"):
        row("bo")


@pytest.mark.parametrize("change", [{"bo": 3}, {"bo": -1}, {"bo": "0"}, {"bo": True}, ["bo"], "bo"])
def test_names_that_lead_nowhere_are_refused(change: Any, tmp_path: Path) -> None:
    shape = HifiGanShape(units=5, embedding=8, speaker=4, speakers=3, channels=32)
    write_vocoder(tmp_path, shape, shape.build().state_dict(), None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "speaker_id_map": change}))
    with pytest.raises(MissingModelError, match="lead to no rows"):
        load_vocoder(tmp_path, "0")


def test_a_table_without_a_row_is_no_vocoder(tmp_path: Path) -> None:
    shape = HifiGanShape(units=5, embedding=8, channels=32)
    write_vocoder(tmp_path, shape, shape.build().state_dict(), None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocoder_num_spkrs": 0}))
    with pytest.raises(MissingModelError, match="without a row"):
        load_vocoder(tmp_path)


def test_a_vocoder_of_one_voice_has_no_speaker_to_choose(tmp_path: Path) -> None:
    shape = HifiGanShape(units=5, embedding=8, channels=32)
    write_vocoder(tmp_path / "hifi", shape, shape.build().state_dict(), None)
    UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(tmp_path / "mel")
    for folder in ("hifi", "mel"):
        load_vocoder(tmp_path / folder)
        with pytest.raises(DataError, match="one voice, so no speaker can be chosen"):
            load_vocoder(tmp_path / folder, "0")


def test_one_voice_is_written_as_it_was(tmp_path: Path) -> None:
    """`config.json` and the names of the weights, as they were before there were speakers."""
    generator = Generator(replace(HifiGanShape(), units=5, embedding=8, channels=32))
    write_vocoder(tmp_path, generator.shape, generator.folded(), None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocoder_num_spkrs"], config["spkr_embed_dim"]) == (1, 0) and "speaker_id_map" not in config
    assert len(config) == 17
    table = load_file(tmp_path / "model.safetensors")["speaker_embedding.weight"]
    assert table.shape == (1, 0) and not generator.net.speaker_embedding.weight.requires_grad


def test_a_run_from_before_there_were_speakers_goes_on() -> None:
    now = toy.recipe(Path("voice"), Path("runs")).model_dump(mode="json")
    before = {**now, "generator": {key: value for key, value in now["generator"].items() if key != "speaker"}}
    assert refused_changes(before, now, (), VoiceRecipe) == []
    assert recorded_speakers(Path("checkpoint"), cast(Any, {})) == ()
    with pytest.raises(CheckpointError, match="no list of names"):
        recorded_speakers(Path("checkpoint"), cast(Any, {"speakers": {"bo": 0}}))


def several(folder: Path, voices: Path, processes: int = 1, **changes: Any) -> Path:
    return run_in(folder, voices, processes, "toy", generator__speaker=8, **changes)


@pytest.fixture(scope="module")
def whole(voices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that nothing has disturbed."""
    return several(tmp_path_factory.mktemp("whole"), voices)


def test_a_run_of_several_speakers_goes_on_as_if_it_had_not_been_killed(
    whole: Path, voices: Path, tmp_path: Path
) -> None:
    run = several(tmp_path, voices, die_at=7)
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]
    several(tmp_path, voices)
    wanted, found = trained_state(whole), trained_state(run)
    assert wanted.keys() == found.keys() and f"optimizer.{TABLE}.exp_avg" in found
    assert [name for name, each in wanted.items() if not torch.equal(each, found[name])] == []
    assert losses_of(run) == losses_of(whole) and len(losses_of(run)) == 5


def test_two_ranks_have_the_gradient_of_one_for_several_speakers(whole: Path, voices: Path, tmp_path: Path) -> None:
    two = several(tmp_path, voices, 2)
    one_U, two_U = (load_file(run / "gradients.safetensors") for run in (whole, two))
    for update in ("000", "001"):
        size = float(one_U[update].norm())
        assert size > 1e-3
        torch.testing.assert_close(two_U[update], one_U[update], rtol=1e-4, atol=1e-5 * size)
    for (_, mine), (_, theirs) in zip(losses_of(two), losses_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)


def test_a_run_goes_on_with_the_rows_it_began_with(whole: Path, voices: Path, tmp_path: Path) -> None:
    """Without the data of one speaker, whose row stays, and not with a voice that is new, nor another width."""
    run = several(tmp_path, voices, optim__steps=2)
    left = toy.write_voices(tmp_path / "left", {"zoe": VOICES["zoe"]})
    new = toy.write_voices(tmp_path / "new", {**VOICES, "ann": toy.ORDINARY})

    def train(voice: Path, **changes: Any) -> Any:
        recipe = toy.recipe(voice, tmp_path / "runs", "toy", **{"generator__speaker": 8, **changes})
        with LocalContext(tmp_path / "runs") as context:
            return train_voice(recipe, context, accept_new_data=True)

    with pytest.raises(DataError, match="speaker 'ann' is not one of the 2"):
        train(new, optim__steps=3)
    with pytest.raises(
        CheckpointError, match=r"other tensors than this vocoder: size mismatch for .*speaker_embedding"
    ):
        train(voices, optim__steps=3, generator__speaker=4)
    assert train(left, optim__steps=3).step == 3
    assert json.loads((run / "vocoder" / "config.json").read_text())["speaker_id_map"] == {"bo": 0, "zoe": 1}
