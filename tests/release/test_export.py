"""Exported runs against stock transformers and PEFT, and against the run itself, after everything else is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from echox import cli
from echox.builders.setup import TextTools, build_stage
from echox.engine.checkpoint.manifest import EXPORTED, MANIFEST, verify
from echox.errors import AlteredModelError, CheckpointError, DataError
from echox.release.export import export
from echox.speak.pipeline import SpeechToSpeech
from tests import tiny
from tests.builders import tiny_run
from tests.speak import voices
from tests.speak.echo_run import clips, write_echo_run

TOKENS = torch.arange(2 * 9).view(2, 9) * 5 % tiny.VOCABULARY


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an Echo run `echo`, its Stage I `s2t`, and what they were made of."""
    folder = tmp_path_factory.mktemp("runs")
    write_echo_run(folder)
    return folder


def logits_of_run(run: Path) -> Tensor:
    """What the LLM of a run computes as it does in training, LoRA apart."""
    stage = SpeechToSpeech.load(run, device="cpu").stage
    with torch.no_grad():
        return stage.s2t.llm(input_ids=TOKENS).logits


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("stage", ["s2t", "echo"])
def test_stock_peft_computes_the_logits_of_the_run(runs: Path, tmp_path: Path, stage: str) -> None:
    from peft import PeftModel

    export(runs / stage, tmp_path / "out", "peft")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"}  # fmt: skip
    base = plain(runs / "llm")
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out").eval())
    torch.testing.assert_close(adapted, logits_of_run(runs / stage), rtol=0, atol=1e-5)
    assert (adapted - before).abs().max() > 0.05, "a LoRA that changes nothing would hide its loss"


@pytest.mark.parametrize("stage", ["s2t", "echo"])
def test_a_merged_folder_computes_the_logits_of_the_run(runs: Path, tmp_path: Path, stage: str) -> None:
    from transformers import AutoTokenizer

    export(runs / stage, tmp_path / "out", "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits_of_run(runs / stage), rtol=0, atol=1e-4)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", runs / "llm"))
    assert ours("w5 w6 .").input_ids == theirs("w5 w6 .").input_ids == [5, 6, tiny_run.STOP]


def test_a_merged_weight_is_w_plus_scale_b_a(runs: Path, tmp_path: Path) -> None:
    export(runs / "s2t", tmp_path / "out", "merged", dtype="bfloat16")
    name = "model.layers.1.mlp.down_proj"
    with safe_open(next((runs / "s2t").rglob("trainable.safetensors")), "pt") as run:
        a, b = (run.get_tensor(f"s2t.llm.base_model.model.{name}.lora_{part}.default.weight") for part in "AB")
    w = load_file(runs / "llm" / "model.safetensors")[f"{name}.weight"]
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    # The LLM is read in bf16; the sum is rounded to it once.
    assert torch.equal(merged, (w.bfloat16().float() + 6 / 4 * b @ a).bfloat16())


@pytest.fixture(scope="module")
def said(runs: Path) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """What the run answers, in text and units, and what its teacher says."""
    return heard(SpeechToSpeech.load(runs / "echo", device="cpu"))


def heard(model: SpeechToSpeech) -> tuple[list[str], list[list[int]], list[list[int]]]:
    model.max_new = 10
    answers = model.answer(clips())
    taught = model.say(["w5 w6 w7 w8", "w12 ."])
    return [a.text for a in answers], [a.units.tolist() for a in answers], [units.tolist() for units in taught]


@pytest.fixture
def taken_away(runs: Path, tmp_path: Path) -> Path:
    """The whole export in a place where nothing of the machine that made it is left."""
    copy = tmp_path / "there"
    shutil.copytree(runs, copy)
    text = {path: path.read_text() for path in copy.rglob("manifest.json")}
    assert all(str(runs) in content for content in text.values())
    export(runs / "echo", tmp_path / "made", "hf", with_encoder=True)
    shutil.rmtree(copy)
    return (tmp_path / "made").rename(tmp_path / "elsewhere")


def test_a_whole_folder_says_what_the_run_says(
    runs: Path, taken_away: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = runs.with_name("away")
    runs.rename(away)
    try:
        found = heard(SpeechToSpeech.load(taken_away, device="cpu"))
    finally:
        away.rename(runs)
    assert found == said
    assert sum(len(units) > 4 for units in said[1]) >= 3 and len(set(map(tuple, said[1]))) > 1
    assert verify(taken_away)["recipe"]["model"]["llm"]["path"] == "."
    assert str(runs) not in (taken_away / MANIFEST).read_text() + (taken_away / "README.md").read_text()
    torch.testing.assert_close(logits(plain(taken_away)), logits_of_run(runs / "echo"), rtol=0, atol=1e-4)


def test_stage_iii_starts_from_a_whole_folder_where_the_run_stood(runs: Path, taken_away: Path) -> None:
    from echox.config.schema import Recipe

    recipe = tiny_run.make_recipe(runs, "echo", init={"s2t": str(taken_away), "t2c": str(taken_away)})
    content = recipe.model_dump(mode="json")
    content["model"]["llm"]["path"] = str(taken_away)
    recipe = Recipe.model_validate(content)
    fresh: Any = build_stage(recipe, TextTools.load(recipe))
    run = SpeechToSpeech.load(runs / "echo", device="cpu").stage
    expected = dict(run.named_parameters()) | dict(run.named_buffers())
    same = [name for name, value in fresh.named_parameters() if name in expected and torch.equal(value, expected[name])]
    for part in ("s2t.front_end.shrink.", "teacher.decoder.head", "echo.head", "denoising.inner", "echo.unit_emb"):
        assert any(name.startswith(part) for name in same), part
    echo = [name for name, _ in fresh.named_parameters() if name.startswith("echo.")]
    taught = {name: expected[name.replace("echo.", "teacher.decoder.", 1)] for name in echo}
    assert not any(torch.equal(expected[name], taught[name]) for name in echo), "a trained Echo is not its teacher"
    assert set(echo) <= set(same)
    lora = [value for name, value in fresh.named_parameters() if ".lora_B" in name]
    assert len(lora) == 14 and all(bool((value == 0).all()) for value in lora), "what was merged does not count twice"
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.eval().s2t.llm(input_ids=TOKENS).logits, logits_of_run(runs / "echo"), rtol=0, atol=1e-4
        )


def test_a_stage_i_export_writes_what_the_run_writes(runs: Path, tmp_path: Path) -> None:
    export(runs / "s2t", tmp_path / "out", "hf")
    ours, theirs = (SpeechToSpeech.load(place, device="cpu") for place in (tmp_path / "out", runs / "s2t"))
    found, wanted = ours.generate(clips()), theirs.generate(clips())
    assert torch.equal(found.tokens_BR, wanted.tokens_BR)
    torch.testing.assert_close(found.hidden_BRh, wanted.hidden_BRh, rtol=0, atol=1e-4)
    assert (wanted.hidden_BRh[0] - wanted.hidden_BRh[1]).abs().max() > 0.01, "it must matter what is heard"
    assert ours.recipe.model.t2c is None
    recipe = tiny_run.make_recipe(runs, "echo", init={"s2t": str(tmp_path / "out"), "t2c": str(tmp_path / "out")})
    with pytest.raises(CheckpointError, match="which has no T2C"):
        build_stage(recipe, TextTools.load(recipe))


def test_the_card_names_base_stages_and_data(runs: Path, taken_away: Path) -> None:
    card = (taken_away / "README.md").read_text()
    for said in ("base_model: llm", "s2t (`s2t`)", "echo (`tiny-echo`)", "nowhere (sqa)", "echox respond tiny/echo",
                 "rank 4, alpha 6", "2 layers of width 16", "echox speak --run"):  # fmt: skip
        assert said in card, said
    config = json.loads((taken_away / "config.json").read_text())
    assert config["model_type"] == "llama" and config["echox"]["weights"] == EXPORTED


def test_the_commands_take_a_whole_folder_as_a_run(
    runs: Path, taken_away: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from echox.audio.io import write_audio

    voices.unit_mel(tiny_run.N_UNITS).model.save(tmp_path / "voice")
    write_audio(tmp_path / "question.wav", clips()[0])
    spoken = []
    for number, run in enumerate((taken_away, runs / "echo")):
        out = tmp_path / f"{number}.wav"
        words = ["--question", str(tmp_path / "question.wav"), "--out", str(out), "--vocoder", str(tmp_path / "voice")]
        assert cli.main(["speak", "--run", str(run), *words]) == 0
        spoken.append((capsys.readouterr().out.splitlines()[0], out.read_bytes()))
    assert spoken[0] == spoken[1] and len(spoken[0][1]) > 4000
    assert cli.main(["checkpoint", "verify", str(taken_away)]) == 0
    assert "ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "peft", "--dtype", "float16"], "--dtype does not go with --format peft"),
        (["--format", "merged", "--with-encoder"], "--with-encoder does not go with --format merged"),
    ],
)
def test_options_of_other_formats_are_refused(
    runs: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(runs / "echo"), str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said_and_leaves_nothing(runs: Path, taken_away: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a t2c run has no language model"):
        export(runs / "t2c", tmp_path / "out", "hf")
    with pytest.raises(CheckpointError, match="an exported folder has no LoRA"):
        export(taken_away, tmp_path / "out", "peft")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="something under this name"):
        export(runs / "echo", tmp_path / "full", "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "full"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[0] += 1
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "file", "error", "said"),
    [
        (cut, EXPORTED, CheckpointError, "bytes, not"),
        (change, EXPORTED, CheckpointError, "does not match its hash"),
        (Path.unlink, EXPORTED, CheckpointError, "is missing"),
    ],
)
def test_a_damaged_folder_is_refused(
    taken_away: Path, damage: Callable[[Path], object], file: str, error: type[Exception], said: str
) -> None:
    damage(taken_away / file)
    with pytest.raises(error, match=said):
        SpeechToSpeech.load(taken_away, device="cpu")


def test_another_speech_encoder_is_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echox.engine.checkpoint import manifest
    from echox.engine.frozen import identify

    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(runs / "s2t", tmp_path / "s2t")
    shutil.copytree(runs / "whisper", tmp_path / "whisper")
    checkpoint = next(tmp_path.rglob(MANIFEST)).parent
    contents: Any = dict(manifest.read_manifest(checkpoint))
    contents["recipe"]["model"]["speech_encoder"]["path"] = str(tmp_path / "whisper")
    contents["frozen"] = identify({"speech_encoder": tmp_path / "whisper", "llm": runs / "llm"})
    files = contents.pop("files")
    manifest.write_manifest(checkpoint, contents, files)

    export(tmp_path / "s2t", tmp_path / "out", "hf")
    SpeechToSpeech.load(tmp_path / "out", device="cpu")
    change(tmp_path / "whisper" / "model.safetensors")
    with pytest.raises(AlteredModelError, match="frozen model 'speech_encoder'"):
        SpeechToSpeech.load(tmp_path / "out", device="cpu")
    with pytest.raises(AlteredModelError, match="frozen model 'speech_encoder'"):
        export(tmp_path / "s2t", tmp_path / "again", "merged")


def test_streamed_and_whole_answers_of_an_exported_folder_agree(taken_away: Path) -> None:
    model = SpeechToSpeech.load(taken_away, device="cpu")
    model.max_new = 10
    (whole,) = model.answer(clips()[:1])
    from echox.speak.events import Units

    pieces = [event.units for event in model.stream(clips()[0], max_new=10) if isinstance(event, Units)]
    assert np.concatenate(pieces).tolist() == whole.units.tolist()
