"""A vocoder learns, goes on after it was killed as if it had not been, and speaks with what it has learnt."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch
from safetensors.torch import load_file

from echox import cli
from echox.audio.io import encode_flac, header_rate, read_audio, resample
from echox.engine.checkpoint.manifest import list_checkpoints, read_manifest
from echox.engine.context import LocalContext
from echox.engine.interfaces import NullTracker
from echox.engine.stop import request_stop
from echox.errors import CheckpointError, TrainingError
from echox.speak.vocoder import CodeHifiGan, load_vocoder
from echox.stream.format.writer import write_shards
from echox.units.identity import read_unit_set
from echox.vocoder.data import VoiceCollate, held_out
from echox.vocoder.generator import Generator
from echox.vocoder.losses import LogMel
from echox.vocoder.samples import MOST_SHOWN, PAGE, Samples
from echox.vocoder.trainer import train_voice
from tests.vocoder import toy
from tests.vocoder.runs import WORKER, losses_of, run_in, trained_state


class Heard(NullTracker):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.artifacts: list[str] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.artifacts.append(f"{folder}/{path.name}")


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_voice(tmp_path_factory.mktemp("voice") / "train")


@pytest.fixture(scope="module")
def whole(voice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that nothing has disturbed."""
    return run_in(tmp_path_factory.mktemp("whole"), voice, 1, "toy")


@pytest.mark.parametrize("die_at", [1, 7], ids=["before a checkpoint", "between two updates"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    whole: Path, voice: Path, tmp_path: Path, die_at: int
) -> None:
    run = run_in(tmp_path, voice, 1, "toy", die_at=die_at)
    saved = [path.name for path in list_checkpoints(run)]
    assert saved == ([] if die_at == 1 else ["step-00000002"])
    assert run_in(tmp_path, voice, 1, "toy") == run
    wanted, found = trained_state(whole), trained_state(run)
    assert wanted.keys() == found.keys() and any(name.startswith("optimizer.generator.") for name in found)
    assert [name for name, each in wanted.items() if not torch.equal(each, found[name])] == []
    assert losses_of(run) == losses_of(whole) and [step for step, _ in losses_of(run)] == [1, 2, 3, 4, 5]
    manifest = read_manifest(list_checkpoints(run)[0])
    assert (
        manifest["attempt"] == 2
        and manifest["cursor"]["stream"]["samples"]
        == read_manifest(list_checkpoints(whole)[0])["cursor"]["stream"]["samples"]
    )


def test_two_ranks_have_the_gradient_of_one(whole: Path, voice: Path, tmp_path: Path) -> None:
    two = run_in(tmp_path, voice, 2, "toy")
    one_U, two_U = (load_file(run / "gradients.safetensors") for run in (whole, two))
    assert len(one_U) == 10, "an update of each network a step"
    for update in ("000", "001"):
        size = float(one_U[update].norm())
        assert size > 1e-3
        torch.testing.assert_close(two_U[update], one_U[update], rtol=1e-4, atol=1e-5 * size)
    for (_, mine), (_, theirs) in zip(losses_of(two), losses_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)
    assert not (two_U["002"] == 0).all()


@pytest.fixture(scope="module")
def learnt(voice: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard, dict[str, Any]]:
    """A run of 30 steps by the command, with waveforms of held-out clips."""
    folder = tmp_path_factory.mktemp("learnt")
    heard, changes = Heard(), {"optim__steps": 30, "checkpoint_every": 0, "sample_every": 20, "samples": 2}
    changes |= {"data__valid": str(voice), "optim__lr": 1e-2, "generator__duration_dropout": 0.0}
    tree = toy.recipe_tree(voice, folder / "runs", **changes)
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echox.tracking.run.open_run", lambda *_, **__: heard)
        words = ["vocoder", "train", str(folder / "recipe.yaml"), "--out", str(folder / "voice")]
        assert cli.main(words) == 0
    return folder, heard, tree


def test_it_learns_to_sound_like_the_voice(learnt: tuple[Path, Heard, dict[str, Any]]) -> None:
    folder, heard, _ = learnt
    mel = {step: row["loss/mel_l1"] for step, row in heard.metrics.items() if "loss/mel_l1" in row}
    assert len(mel) == 30 and np.mean([mel[28], mel[29], mel[30]]) < 0.8 * mel[1], mel
    duration = [row["loss/duration"] for row in heard.metrics.values()]
    assert duration[-1] < 0.5 * duration[0], "units that last by what they are"
    first = heard.metrics[1]
    parts = [first[f"loss/{name}"] for name in ("adversarial", "features", "mel", "duration")]
    assert first["loss/total"] == pytest.approx(sum(parts)) and first["loss/mel"] == pytest.approx(45 * mel[1])
    assert first["data/epoch"] > 0 and first["lr/generator"] == 1e-2
    assert heard.metrics[30]["lr/generator"] < 1e-2, "it decays by the epoch"
    assert heard.metrics[30]["valid/loss/mel_l1"] < heard.metrics[20]["valid/loss/mel_l1"] < mel[1]


def test_waveforms_of_held_out_clips_are_kept(learnt: tuple[Path, Heard, dict[str, Any]], voice: Path) -> None:
    folder, heard, _ = learnt
    place = folder / "runs" / "toy" / "samples"
    files = ["real-00.wav", "real-01.wav", "step-00000020/spoken-00.wav", "step-00000020/spoken-01.wav"]
    assert heard.artifacts[:5] == [f"samples/{name}" for name in ("samples.html", *files)]
    assert len(heard.artifacts) == 10 and heard.artifacts[-1] == "samples/step-00000030/spoken-01.wav"
    real, spoken = read_audio(place / files[0]), read_audio(place / files[2])
    assert len(real) == len(spoken) and np.abs(real - spoken).max() > 0.01
    assert np.abs(real - toy.clip(0)[2][: len(real)]).max() < 1e-3


def test_the_page_plays_the_clips_of_every_step(learnt: tuple[Path, Heard, dict[str, Any]]) -> None:
    place = learnt[0] / "runs" / "toy" / "samples"
    page = (place / "samples.html").read_text()
    played = [base64.b64decode(each) for each in re.findall(r'src="data:audio/wav;base64,([^"]*)"', page)]
    files = [
        path for clip in ("00", "01")
        for path in (f"real-{clip}", f"step-00000030/spoken-{clip}", f"step-00000020/spoken-{clip}")
    ]  # fmt: skip
    assert played == [(place / f"{path}.wav").read_bytes() for path in files]


def test_the_page_of_a_long_run_shows_its_last_its_first_and_some_steps_between(tmp_path: Path) -> None:
    config = toy.recipe(tmp_path, tmp_path).generator
    networks = Generator(config.shape(5))
    (clip,) = held_out(str(toy.write_voice(tmp_path / "voice", 1)), VoiceCollate(5, 8, 0, 16_000), 1)
    samples = Samples(tmp_path, [clip], 16_000)
    for step in range(0, 5 * (MOST_SHOWN + 8), 5):
        samples.speak(step, networks, LogMel(16_000))
    assert networks.training, "it goes on to train"
    shown = [int(step) for step in re.findall(r"<tr><td>(\d+)</td>", (tmp_path / "samples" / PAGE).read_text())]
    assert len(shown) == MOST_SHOWN and shown == sorted(shown, reverse=True)
    assert (shown[0], shown[-1]) == (5 * (MOST_SHOWN + 7), 0)


def test_what_was_trained_streams_as_the_whole(learnt: tuple[Path, Heard, dict[str, Any]]) -> None:
    folder, _, _ = learnt
    vocoder = load_vocoder(folder / "voice")
    assert isinstance(vocoder, CodeHifiGan) and read_unit_set(folder / "voice") == toy.UNIT_SET
    units = np.resize(toy.clip(1)[0], 50)
    (wave,) = vocoder([units])
    assert len(wave) % 320 == 0 and float(np.abs(wave).max()) > 0.01
    for size in (1, 3, 8, 50):
        stream = vocoder.stream()
        pieces = [stream.push(units[start : start + size]) for start in range(0, 50, size)]
        assert np.array_equal(np.concatenate([*pieces, stream.close()]), wave), size
    ones = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        expected, _ = vocoder.model(torch.from_numpy(units.astype(np.int64))[None], ones, ones)
    np.testing.assert_allclose(wave, expected.reshape(-1).numpy(), atol=1e-5)


def test_a_finished_run_is_done_and_goes_on_with_more_steps_alone(
    learnt: tuple[Path, Heard, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, tree = learnt
    run = folder / "runs" / "toy"
    (run / "vocoder" / "model.safetensors").unlink()
    with LocalContext(folder / "runs") as context:
        done = train_voice(toy.VoiceRecipe.model_validate(tree), context)
        assert done.already_done and done.step == 30 and done.metrics["loss/total"] > 0
        assert (run / "vocoder" / "model.safetensors").is_file(), "lost with the end of an attempt, it is made again"
        other = {**tree, "loss": {"mel": 1.0}}
        with pytest.raises(CheckpointError, match=r"loss.mel is 1.0 and was 45.0"):
            train_voice(toy.VoiceRecipe.model_validate(other), context)
        more = {**tree, "optim": {**tree["optim"], "steps": 31}}
        assert train_voice(toy.VoiceRecipe.model_validate(more), context).step == 31
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == ["step-00000031  ok", "step-00000030  ok"]


def test_a_run_that_is_asked_to_stop_saves_and_ends(voice: Path, tmp_path: Path) -> None:
    request_stop(tmp_path / "stop", "lunch")  # It is heard while the run still builds.
    with LocalContext(tmp_path) as context:
        result = train_voice(toy.recipe(voice, tmp_path, "stop", checkpoint_every=0), context)
    assert (result.step, result.stopped) == (1, "lunch")
    assert [path.name for path in list_checkpoints(tmp_path / "stop")] == ["step-00000001"]
    assert json.loads((tmp_path / "stop" / "progress.json").read_text())["state"] == "stopped"


def test_all_ranks_say_why_one_of_them_was_asked_to_stop(voice: Path, tmp_path: Path) -> None:
    recipe = toy.recipe_tree(voice, tmp_path / "runs", "drained", checkpoint_every=0, optim__steps=40)
    outcome = launch(tmp_path, WORKER, 2, [{"name": "drained", "recipe": recipe, "drained": 1}])["drained"]
    assert outcome["stopped"] == "a node is taken away" and outcome["step"] < 40
    assert [path.name for path in list_checkpoints(tmp_path / "runs" / "drained")] == [f"step-{outcome['step']:08d}"]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(voice: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(voice, tmp_path, "bad", loss__mel=1e308, log_every=50)
    with LocalContext(tmp_path) as context, pytest.raises(TrainingError, match="is not a finite number at step"):
        train_voice(recipe, context)
    assert list_checkpoints(tmp_path / "bad") == []


def test_a_voice_of_24_khz_is_trained_and_speaks_at_its_rate(tmp_path: Path) -> None:
    units, durations, wave = toy.clip(0)
    flac = encode_flac(resample(wave, 16_000, 24_000), 24_000)
    write_shards(tmp_path / "set", [toy.sample("s", units, durations, wave, **{"answer.flac": flac})])
    rates = {"sample_rate": 24_000, "rates": (5, 4, 4, 3, 2), "kernels": (11, 8, 8, 7, 4), "units": 5}
    changes = {f"generator__{key}": value for key, value in rates.items()}
    changes |= {"data__global_batch": 2, "data__valid": str(tmp_path / "set"), "optim__steps": 1}
    recipe = toy.recipe(tmp_path / "set", tmp_path, "high", **changes)
    with LocalContext(tmp_path) as context:
        train_voice(recipe, context)
    vocoder = load_vocoder(tmp_path / "high" / "vocoder")
    (spoken,) = vocoder([units], [durations])
    assert vocoder.sample_rate == 24_000 and len(spoken) == 480 * int(durations.sum())
    assert header_rate((tmp_path / "high" / "samples" / "real-00.wav").read_bytes()) == 24_000
    stream = vocoder.stream()
    pieces = [stream.push(units[place : place + 2]) for place in range(0, len(units), 2)]
    assert np.array_equal(np.concatenate([*pieces, stream.close()]), vocoder([units])[0])


def test_damaged_clips_are_dropped_and_counted(tmp_path: Path) -> None:
    good = [toy.sample(f"s{seed}", *toy.clip(seed)) for seed in range(3)]
    bad = toy.sample("bad", *toy.clip(3), **{"answer.durations": b"\1\0"})
    write_shards(tmp_path / "set", [*good, bad])
    recipe = toy.recipe(tmp_path / "set", tmp_path, "drop", optim__steps=1, generator__units=5)
    with LocalContext(tmp_path) as context:
        result = train_voice(recipe, context)
    assert result.metrics["data/quarantined"] == 1 and math.isfinite(result.metrics["loss/total"])
    (line,) = (tmp_path / "drop" / "quarantine" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "bad"
