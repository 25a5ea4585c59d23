"""A voice for an LLM: what is found in a stranger's folder, what is decided, and which steps are done again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.config.load import load_recipe
from echox.errors import LaunchError, RecipeError
from echox.vocoder.recipe import load_voice
from launch.project import store
from launch.project.look import Llm, Recordings, look_at
from launch.project.plan import Project, remarks, sizes
from launch.project.recipes import recipes
from launch.project.run import STATE, run
from launch.project.steps import Step, steps
from shards.builder.hold_out import part_of
from shards.corpora.registry import CORPORA
from shards.corpus import Request
from tests.shards.layouts import clip, encoded, put, put_lines

LLM = Llm("some/llm", layers=4, width=64, vocabulary=500, parameters=1e6, has_template=True, begin="<s>", end="</s>")


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """Thirty recordings in six formats, three that are broken, three without text."""
    folder = tmp_path / "voice"
    for number, kind in enumerate(["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"] * 5):
        put(folder / f"{number:02d}.{kind.lower()}", encoded(clip(number, 1.0, 22_050), 22_050, kind))
        if number >= 3:
            put(folder / f"{number:02d}.txt", f"sentence {number}")
    for name in ("a.wav", "b.mp3", "c.flac"):
        put(folder / name, b"no sound")
        put(folder / f"{name[0]}.txt", "x")
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"text": f"question {number}?", "answer_text": f"Answer {number}."} for number in range(40)]
    return put_lines(tmp_path / "questions.jsonl", rows)


def project(folder: Path, voice: Path, questions: Path | None, **more: Any) -> Project:
    given: dict[str, Any] = {
        "language": None,
        "whisper": "openai/whisper-base",
        "recogniser": None,
        "speaker": None,
        "gpus": 0,
    }
    return Project(folder, "some/llm", voice, questions, **{**given, **more})


def test_what_is_in_a_strangers_folder(voice: Path, questions: Path) -> None:
    found = look_at(voice, "tts")
    assert (found.format, found.count, found.usable, found.untold) == ("folder of recordings", 33, 30, 3)
    assert set(found.broken) == {"a.wav", "b.mp3", "c.flac"}
    assert found.hours == pytest.approx(30 / 3600, rel=0.02) and found.rates == {22_050: 30}
    asked = look_at(questions, "sqa")
    assert (asked.count, asked.silent, asked.unanswered, asked.hours) == (40, 40, 0, 0)
    said = "\n".join(remarks(project(voice.parent, voice, questions), LLM, found, asked))
    assert "voice: 3 cannot be used and are left out (a.wav: " in said
    assert "voice: 3 without text need --transcribe WHISPER, or a text" in said
    assert "missing: a voice (--speak VOICE.onnx) for 40 questions without sound" in said
    nothing = "\n".join(remarks(project(voice.parent, voice, None), replace(LLM, has_template=False), found, None))
    assert "missing: questions with answers" in nothing and "missing: a chat template" in nothing


def test_hours_of_more_recordings_than_are_looked_at_are_estimated(
    voice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.project.look.LOOKED_AT", 10)
    assert look_at(voice, "tts").hours == pytest.approx(33 / 3600, rel=0.02), (
        "those that are not looked at may be broken"
    )


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("hours", [0.5, 100.0])
def test_recipes_are_right_and_say_what_they_stand_on(tmp_path: Path, voice: Path, gpus: int, hours: float) -> None:
    heard = Recordings(voice, "x", count=1000, hours=hours)
    asked = Recordings(voice, "x", count=640)
    made = project(tmp_path / "mine", voice, voice, gpus=gpus)
    size = sizes(heard, asked, gpus)
    store.write(made, size.clusters, recipes(made, LLM, heard, size), ["a remark"])
    s2t, t2c, echo = (load_recipe(tmp_path / "mine" / f"{stage}.yaml") for stage in ("s2t", "t2c", "echo"))
    assert s2t.optim.steps == (200 if hours < 20 and not gpus else 60)
    assert t2c.model.t2c is not None and t2c.model.t2c.layers == (4 if hours < 20 else 6)
    assert echo.init.s2t == str(tmp_path / "mine/runs/s2t") and echo.scaling.workers == (gpus or 2)
    vocoder = load_voice(tmp_path / "mine" / "vocoder.yaml")
    assert vocoder.optim.steps == (100_000 if gpus else 1000)
    assert store.read(tmp_path / "mine") == (made, size.clusters)
    assert "- a remark" in (tmp_path / "mine" / "README.md").read_text()
    with pytest.raises(RecipeError, match="there is a project already"):
        store.write(made, size.clusters, {}, [])


@pytest.mark.parametrize("text", ["gpus: x", "[]", "llm: 5", "clusters: -1", "voice: null", "a: [", "!!python/name:os"])
def test_a_project_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="there is no project"):
        store.read(tmp_path)
    put(tmp_path / store.FILE, text)
    with pytest.raises(RecipeError):
        store.read(tmp_path)


def test_every_utterance_is_in_one_part_and_stays_there(questions: Path) -> None:
    corpus, request = CORPORA["manifest"], Request(task="sqa")

    def ids(part: str) -> set[str]:
        return {each.id for each in part_of(corpus, part, 0.3).discover(questions, request)}

    train, valid = ids("train"), ids("valid")
    assert not train & valid and len(train | valid) == 40 and 4 <= len(valid) <= 20
    put_lines(questions, [{"text": f"question {number}?", "answer_text": "A."} for number in range(60)])
    assert valid <= ids("valid") and not ids("valid") & train


class Commands:
    """Runs nothing, and remembers what it was to run; `dies` at a step."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dies = ""

    def __call__(self, words: Sequence[str], processes: int) -> None:
        name = " ".join(words[:2])
        if self.dies and self.dies in " ".join(words):
            raise LaunchError("killed")
        self.ran.append(name)


def chain(folder: Path) -> list[Step]:
    for name in ("sound", "list"):
        put(folder / name, name)
    put(folder / "recipe.yaml", "a: 1")
    return [
        Step("voice", ("make", "voice"), (folder / "sound",)),
        Step("units", ("make", "units"), after=("voice",)),
        Step("asked", ("make", "asked"), (folder / "list",)),
        Step("t2c", ("make", "t2c"), (folder / "recipe.yaml",), ("units",)),
        Step("echo", ("make", "echo"), after=("asked", "t2c")),
    ]


def test_only_what_hangs_on_a_change_is_done_again(tmp_path: Path) -> None:
    commands, said = Commands(), list[str]()

    def again() -> list[str]:
        commands.ran.clear()
        run(tmp_path, chain_, said.append, runner=commands)
        return [name.removeprefix("make ") for name in commands.ran]

    chain_ = chain(tmp_path)
    assert again() == ["voice", "units", "asked", "t2c", "echo"]
    assert again() == [] and said[-1] == "[5/5] echo: done"
    put(tmp_path / "list", "another one")
    assert again() == ["asked", "echo"]
    put(tmp_path / "recipe.yaml", "a: 1")
    assert again() == [], "saved without a change"
    put(tmp_path / "recipe.yaml", "a: 2")
    assert again() == ["t2c", "echo"]
    put(tmp_path / "sound", "louder")
    assert again() == ["voice", "units", "t2c", "echo"]
    chain_[2] = replace(chain_[2], words=("make", "asked", "--more"))
    assert again() == ["asked", "echo"]


def test_a_project_that_is_killed_goes_on_at_that_step(tmp_path: Path) -> None:
    commands, found = Commands(), chain(tmp_path)
    commands.dies = "t2c"
    with pytest.raises(LaunchError):
        run(tmp_path, found, print, runner=commands)
    assert commands.ran == ["make voice", "make units", "make asked"]
    assert set(json.loads((tmp_path / STATE).read_text())) == {"voice", "units", "asked"}
    commands.dies = ""
    commands.ran.clear()
    assert run(tmp_path, found, print, runner=commands) == 2 and commands.ran == ["make t2c", "make echo"]


def test_steps_of_a_project_come_behind_those_they_hang_on(tmp_path: Path, voice: Path, questions: Path) -> None:
    for gpus in (0, 8):
        made = project(tmp_path / "mine", voice, questions, gpus=gpus, recogniser="w", language="de", speaker=voice)
        found = steps(made, 200)
        for number, step in enumerate(found):
            assert set(step.after) <= {each.name for each in found[:number]}
        words = {step.name: " ".join(step.words) for step in found}
        assert ("encode" in words) == (gpus == 0)
        assert "--transcribe w --language de" in words["voice"] and f"--speak {voice}" in words["questions-train"]
        assert "--part valid" in words["voice-valid"] and "--units" in words["voice-valid"]
    assert "echo" not in {step.name for step in steps(project(tmp_path, voice, None), 200)}


def test_a_cluster_trains_as_jobs(tmp_path: Path, voice: Path, questions: Path) -> None:
    heard = Recordings(voice, "x", count=100, hours=1.0)
    made = project(tmp_path / "mine", voice, questions)
    size = sizes(heard, heard, 0)
    store.write(made, size.clusters, recipes(made, LLM, heard, size), [])
    commands = Commands()
    run(made.folder, steps(made, 200), print, cluster=True, runner=commands)
    assert commands.ran.count("submit " + str(made.folder / "s2t.yaml")) == 1
    assert [name for name in commands.ran if name.startswith("submit")] == [
        f"submit {made.folder / f'{stage}.yaml'}" for stage in ("s2t", "t2c", "echo", "echo", "vocoder")
    ]


def test_energy_of_the_recordings_is_no_matter(voice: Path) -> None:
    """Silence has a header like any other sound: the build finds it."""
    put(voice / "quiet.wav", encoded(np.zeros(16_000, np.int16)))
    put(voice / "quiet.txt", "x")
    assert "quiet.wav" not in look_at(voice, "tts").broken
