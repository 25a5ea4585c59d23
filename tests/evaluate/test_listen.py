"""Checkpoints of a run answer the same questions while it trains: what is asked, kept, shown and recorded."""

from __future__ import annotations

import json
import shutil
import threading
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from echox.audio.io import read_audio, write_audio
from echox.builders.setup import TextTools, build_stage
from echox.cli import main
from echox.config.schema import Recipe
from echox.engine.checkpoint.manifest import WEIGHTS, checkpoints_folder, step_name
from echox.engine.checkpoint.recorded import recipe_of
from echox.evaluate import listen
from echox.evaluate.checkpoints_aloud import PAGE, RECORD, CheckpointsAloud, files_as_questions
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.speak.vocoder import load_vocoder
from echox.tracking.run import open_run
from tests.builders import tiny_run
from tests.speak.echo_run import clips, write_echo_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An echo run, two questions, a vocoder."""
    folder = tmp_path_factory.mktemp("listen")
    write_echo_run(folder)
    vocoder = UnitMel(UnitMelConfig(n_units=tiny_run.N_UNITS, width=16, blocks=1, max_duration=1))
    torch.nn.init.normal_(vocoder.map_RM, std=0.3)
    vocoder.save(folder / "vocoder")
    for number, clip in enumerate(clips()[:2]):
        write_audio(folder / f"q{number}.wav", clip)
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights would write on and on."""
    init = SpeechToSpeech.__init__
    monkeypatch.setattr(SpeechToSpeech, "__init__", partialmethod(init, max_new=4))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "echo", tmp_path / "echo"))


def words(made: Path, run: Path, *more: str) -> list[str]:
    asked = [f"--question={made / name}" for name in ("q0.wav", "q1.wav")]
    return ["listen", str(run), "--device", "cpu", "--vocoder", str(made / "vocoder"), *asked, *more]


def add_checkpoint(run: Path, step: int, seed: int) -> Path:
    """Another checkpoint of the run, of other random weights; it appears at once, as a published one does."""
    recipe: Recipe = recipe_of(next(iter(checkpoints_folder(run).iterdir())))
    module = build_stage(recipe, TextTools.load(recipe))
    tiny_run.randomise(module, seed)
    aside = tiny_run.write_run(run / f"aside-{step}", recipe, tiny_run.trained(module), step=step)
    target = checkpoints_folder(run) / step_name(step)
    shutil.rmtree(target, ignore_errors=True)
    (checkpoints_folder(aside) / step_name(step)).rename(target)
    return target


def record(run: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in json.loads((run / "listen" / RECORD).read_text())["heard"]}


def test_what_is_heard_is_what_each_checkpoint_answers(
    made: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = next(iter(checkpoints_folder(run).iterdir()))
    first = add_checkpoint(run, 2, seed=40)
    assert main(words(made, run)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "listen" / PAGE)
    page = (run / "listen" / PAGE).read_text()
    questions = [read_audio(made / name) for name in ("q0.wav", "q1.wav")]
    texts = set()
    for checkpoint in (first, last):
        step = int(checkpoint.name.removeprefix("step-"))
        answers = SpeechToSpeech.load(checkpoint, device="cpu").answer(questions)
        for number, (answer, said) in enumerate(zip(answers, record(run)[step]["said"], strict=True)):
            assert said["text"] == answer.text
            assert said["seconds"] > 0, "a silent answer compares nothing"
            wave = load_vocoder(made / "vocoder")([answer.units])[0]
            found = read_audio(run / "listen" / checkpoint.name / f"answer-{number}.wav")
            np.testing.assert_allclose(found, np.clip(wave, -1, 1), atol=2**-15)
            texts.add((number, answer.text, len(wave)))
    assert len(texts) == 4, "the two checkpoints say different things"
    assert page.count("<audio") == 2 + 4


def test_it_goes_on_where_it_was_and_asks_nothing_twice(made: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(words(made, run)) == 0
    before = record(run)
    loaded: list[str] = []
    load = SpeechToSpeech.load

    def counted(checkpoint: Path, device: str | None = None) -> SpeechToSpeech:
        loaded.append(checkpoint.name)
        return load(checkpoint, device)

    monkeypatch.setattr(SpeechToSpeech, "load", counted)
    add_checkpoint(run, 2, seed=40)
    assert main(words(made, run)) == 0
    assert loaded == [step_name(2)]
    again = add_checkpoint(run, 2, seed=41)  # trained again after a crash
    earlier = record(run)[2]
    assert main(words(made, run)) == 0
    assert loaded == [step_name(2)] * 2 and record(run)[2]["manifest"] != earlier["manifest"]
    shutil.rmtree(again)  # no longer kept by the run
    assert main(words(made, run)) == 0
    assert loaded == [step_name(2)] * 2 and set(record(run)) == {2, *before}, "what was heard stays"


def test_other_questions_need_another_folder(made: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(made, run)) == 0
    kept = (run / "listen" / RECORD).read_bytes()
    assert main([*words(made, run), "--question", str(made / "q1.wav")]) != 0
    assert "answers to other questions" in capsys.readouterr().err
    assert (run / "listen" / RECORD).read_bytes() == kept


def test_damaged_checkpoints_are_passed_over_and_named_once(made: Path, run: Path) -> None:
    bad = add_checkpoint(run, 2, seed=40)
    (bad / WEIGHTS).write_bytes(b"x" + (bad / WEIGHTS).read_bytes()[1:])
    (checkpoints_folder(run) / step_name(3)).mkdir()  # nothing in it yet
    said: list[str] = []
    aloud = CheckpointsAloud(
        run / "listen",
        files_as_questions([made / "q0.wav"]),
        lambda checkpoint: SpeechToSpeech.load(checkpoint, device="cpu"),
        load_vocoder(made / "vocoder"),
    )
    assert len(aloud.look(run, said.append)) == 1 and aloud.look(run, said.append) == []
    assert len(said) == 1 and step_name(2) in said[0]


def test_a_run_that_trains_is_followed_to_its_end(made: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "POLL_S", 0.05)
    (only,) = checkpoints_folder(run).iterdir()
    only.rename(run / "later")

    def progress(state: str) -> None:
        (run / "progress.json").write_text(json.dumps({"state": state, "step": 1, "steps": 2}))

    progress("training")
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(main(words(made, run, "--follow"))))
    thread.start()
    time.sleep(0.3)
    (run / "later").rename(only)
    deadline = time.monotonic() + 60
    while not (run / "listen" / RECORD).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert thread.is_alive(), "it goes on"
    add_checkpoint(run, 100, seed=42)
    progress("finished")
    thread.join(timeout=60)
    assert done == [0] and len(record(run)) == 2


def test_the_run_in_mlflow_gets_the_sounds_and_two_numbers(made: Path, run: Path) -> None:
    (checkpoint,) = checkpoints_folder(run).iterdir()
    recipe = recipe_of(checkpoint).model_copy(update={"name": "echo"})
    tracker = open_run(recipe, {}, storage=run.parent)
    tracker.finish("FINISHED")
    state = json.loads((run / "mlflow.json").read_text())
    assert main(words(made, run)) == 0
    client = MlflowClient(state["uri"])
    sounds = client.list_artifacts(state["run_id"], f"listen/{checkpoint.name}")
    assert [file.path.rsplit("/", 1)[1] for file in sounds] == ["answer-0.wav", "answer-1.wav"]
    assert PAGE in {Path(file.path).name for file in client.list_artifacts(state["run_id"], "listen")}
    (point,) = client.get_metric_history(state["run_id"], "listen/speech_s")
    said = record(run)[point.step]["said"]
    assert point.value == pytest.approx(sum(each["seconds"] for each in said) / 2)
    assert client.get_run(state["run_id"]).info.status == "FINISHED"


def test_a_run_that_cannot_speak_is_one_sentence(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(made, made / "s2t")) != 0
    assert "does not speak" in capsys.readouterr().err
    assert main([*words(made, made / "echo"), "--number", "0"]) != 0
    (made / "empty").mkdir(exist_ok=True)
    assert main(words(made, made / "empty")) != 0
    assert main(words(made, made / "empty", "--follow")) != 0
    assert "no checkpoint found" in capsys.readouterr().err
    assert not (made / "empty" / "listen").exists() and (made / "echo").joinpath("checkpoints").is_dir()


def test_a_folder_that_leads_out_of_the_run_is_not_written_to(
    made: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "listen").symlink_to(tmp_path / "elsewhere")
    assert main(words(made, run)) != 0
    assert "--out" in capsys.readouterr().err and not list((tmp_path / "elsewhere").iterdir())
