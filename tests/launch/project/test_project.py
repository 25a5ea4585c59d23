"""A voice for an LLM: what is found in a stranger's folder, what is decided, and which steps are done again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox import cli
from echox.bench.plan.forecast import forecast
from echox.bench.plan.load import Sample
from echox.config.load import load_recipe, resolved
from echox.config.paths import KNOWN_MODELS
from echox.config.schema import Recipe
from echox.engine.hardware import GPUS
from echox.errors import LaunchError, MissingModelError, RecipeError
from echox.evaluate.demo import JUDGE
from echox.vocoder.recipe import load_voice
from launch.project import store
from launch.project.cli import find_judge
from launch.project.cost import costs, sample_of
from launch.project.ledger import STATE, Row, read_done, table
from launch.project.look import Llm, Recordings, look_at, sounds
from launch.project.plan import Project, remarks, share_held_out, sizes
from launch.project.recipes import recipes
from launch.project.run import run, states
from launch.project.steps import Step, steps
from tests.builders.tiny_run import write_models
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
        "judge": "some/whisper",
        "held_out": 0.2,
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
    assert "held out: 20%" in said and "judge of what the model says: some/whisper" in said
    assert "22.7% after 1.8 h and 11.3% after 6.7 h of speech" in said and "0.01 h is less: more errors" in said
    nothing = "\n".join(remarks(project(voice.parent, voice, None), replace(LLM, has_template=False), found, None))
    assert "missing: questions with answers" in nothing and "missing: a chat template" in nothing


def test_who_judges_is_said_and_who_is_missing(voice: Path, questions: Path) -> None:
    found, asked = Recordings(voice, "x", count=9, hours=3.0), Recordings(questions, "x", count=9)

    def said(**more: Any) -> str:
        return list(remarks(project(voice.parent, voice, questions, **more), LLM, found, asked))[-1]

    assert said(judge=None).startswith("missing: a judge") and "without, there are no scores and no report" in said(
        judge=None
    )
    assert "also wrote down the recordings" in said(recogniser="some/whisper")
    assert "the model's own ear" in said(judge="openai/whisper-base")


def test_the_judge_is_the_one_named_or_the_recogniser_or_the_demos_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    assert find_judge(None, None) is None
    for name in ("a/one", "b/two", JUDGE):
        known = KNOWN_MODELS.get(name)
        for file in ("config.json", "model.safetensors", *(known.files if known else ())):
            put(tmp_path / "models" / name / file, "{}")
    assert find_judge("a/one", "b/two") == "a/one" and find_judge(None, "b/two") == "b/two"
    assert find_judge(None, None) == JUDGE
    with pytest.raises(MissingModelError):
        find_judge("c/three", None)


@pytest.mark.parametrize(
    ("counts", "share"), [((40, 40), 0.2), ((93, 60), 0.133), ((1000, 90), 0.089), ((9999,), 0.05)]
)
def test_a_short_list_gives_more_to_validation_and_test(counts: tuple[int, ...], share: float) -> None:
    assert share_held_out(*(Recordings(Path(), "x", count=count) for count in counts), None) == share


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
    folder = tmp_path / "mine: a #1"
    made = project(folder, voice, voice, gpus=gpus, language="de")
    size = sizes(heard, asked, gpus)
    store.write_recipes(made, recipes(made, LLM, heard, size))
    store.write(made, size.clusters, ["a remark"])
    s2t, t2c, echo = (load_recipe(folder / f"{stage}.yaml") for stage in ("s2t", "t2c", "echo"))
    assert s2t.optim.steps == (200 if hours < 20 and not gpus else 60)
    assert t2c.model.t2c is not None and t2c.model.t2c.layers == (4 if hours < 20 else 6)
    assert echo.init.s2t == str(folder / "runs" / "mine-a-1-s2t") and echo.scaling.workers == (gpus or 2)
    assert Path(echo.storage) / echo.name == made.run("echo") and echo.scale == "mine-a-1"
    vocoder = load_voice(folder / "vocoder.yaml")
    assert Path(vocoder.storage) / vocoder.name == made.vocoder.parent
    assert vocoder.optim.steps == (100_000 if gpus else 1000)
    assert store.read(folder) == (made, size.clusters)
    assert "- a remark" in (folder / "README.md").read_text()
    assert (s2t.language, t2c.language, echo.language) == ("de",) * 3
    with pytest.raises(RecipeError, match="there is a project already"):
        store.write_recipes(made, {})


GOOD = "llm: a\nvoice: b\nwhisper: c\nheld_out: 0.1\ngpus: 0\nclusters: 9\n"


@pytest.mark.parametrize(
    "text",
    [
        *("gpus: x", "[]", "llm: 5", "clusters: -1", "voice: null", "a: [", "!!python/name:os"),
        *(GOOD.replace("0.1", share) for share in ("0", "0.5", "true", "x", ".nan")),
        *(GOOD.replace(line, "") for line in GOOD.splitlines(keepends=True)),
    ],
)
def test_a_project_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="there is no project"):
        store.read(tmp_path)
    put(tmp_path / store.FILE, GOOD)
    assert store.read(tmp_path)[0].held_out == 0.1
    put(tmp_path / store.FILE, text)
    with pytest.raises(RecipeError):
        store.read(tmp_path)


class Commands:
    """Runs nothing, and remembers what it was to run; `dies` at a step."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dies = ""
        self.words: dict[str, list[str]] = {}

    def __call__(self, words: Sequence[str], processes: int) -> None:
        name = " ".join(words[:2])
        if self.dies and self.dies in " ".join(words):
            raise LaunchError("killed")
        self.ran.append(name)
        self.words[name] = list(words)


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
    assert said[-2] == "[5/5] echo: running echox make echo" and said[-1].startswith(
        "[5/5] echo: done in 0 s, 0 s since"
    )
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


@pytest.mark.parametrize("name", ["voice", "units", "asked", "t2c", "echo"])
def test_a_project_that_is_killed_goes_on_at_that_step(tmp_path: Path, name: str) -> None:
    commands, found, said = Commands(), chain(tmp_path), list[str]()
    names = [step.name for step in found]
    commands.dies = name
    with pytest.raises(LaunchError):
        run(tmp_path, found, said.append, runner=commands)
    before = names[: names.index(name)]
    assert commands.ran == [f"make {each}" for each in before] and list(read_done(tmp_path)) == before
    assert said[-1].endswith(f"] {name}: left, after 0 s")
    assert [row.state for row in states(tmp_path, found)] == ["done"] * len(before) + ["left"] * (5 - len(before))
    commands.dies = ""
    commands.ran.clear()
    assert run(tmp_path, found, print, runner=commands) == 5 - len(before)
    assert commands.ran == [f"make {each}" for each in names[names.index(name) :]]


def test_a_change_that_is_taken_back_after_a_kill_is_done_again(tmp_path: Path) -> None:
    """What was half done by the change is not what the step's record speaks of, nor what the steps behind it used."""
    commands, found = Commands(), chain(tmp_path)
    run(tmp_path, found, print, runner=commands)
    put(tmp_path / "recipe.yaml", "a: 2")
    commands.dies = "t2c"
    with pytest.raises(LaunchError):
        run(tmp_path, found, print, until="t2c", runner=commands)
    put(tmp_path / "recipe.yaml", "a: 1")
    commands.dies = ""
    commands.ran.clear()
    assert run(tmp_path, found, print, runner=commands) == 2 and commands.ran == ["make t2c", "make echo"]


def test_a_result_that_is_gone_is_made_again_with_what_hangs_on_it(tmp_path: Path) -> None:
    commands, found = Commands(), chain(tmp_path)
    found[1] = replace(found[1], makes=tmp_path / "units")
    (tmp_path / "units").mkdir()
    assert run(tmp_path, found, print, runner=commands) == 5 and run(tmp_path, found, print, runner=commands) == 0
    (tmp_path / "units").rmdir()
    commands.ran.clear()
    run(tmp_path, found, print, until="units", runner=commands)
    (tmp_path / "units").mkdir()
    run(tmp_path, found, print, runner=commands)
    assert commands.ran == ["make units", "make t2c", "make echo"]


def test_how_a_project_stands_is_seen_while_it_runs_and_it_runs_once(tmp_path: Path) -> None:
    found, seen = chain(tmp_path), list[list[Row]]()

    def runner(words: Sequence[str], processes: int) -> None:
        seen.append(states(tmp_path, found))
        with pytest.raises(LaunchError, match="is being run already"):
            run(tmp_path, found, print, runner=Commands())

    assert [row.state for row in states(tmp_path, found)] == ["left"] * 5, "a project that never ran"
    watched: list[list[str]] = []
    run(tmp_path, found, print, runner=runner, watch=lambda done: watched.append(list(done)))
    assert [row.state for row in seen[2]] == ["done", "done", "running", "left", "left"]
    assert seen[2][2].seconds is not None and seen[2][2].seconds < 60 and seen[2][3].seconds is None
    assert [row.state for row in states(tmp_path, found)] == ["done"] * 5
    assert watched[1] == ["voice", "units"] and len(watched) == 5
    put(tmp_path / STATE, '{"voice": "x", "units": {"key": 1}, "asked": {"key": "a", "seconds": "b"}, "echo": 3}')
    assert [row.state for row in states(tmp_path, found)] == ["left"] * 5, "a record of something else"


def test_the_table_of_steps() -> None:
    rows = [Row("voice", "done", 12.4), Row("unit-language", "running", 1234.0), Row("echo", "left")]
    assert table(rows).splitlines() == [
        "step           state    seconds",
        "voice          done          12",
        "unit-language  running    1,234",
        "echo           left",
        "1,246 s in all, 1 left",
    ]


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
        for name in ("voice", "voice-train", "voice-valid", "voice-test", "questions-test"):
            assert "--valid-share 0.2 --test-share 0.2" in words[name]
        data = tmp_path / "mine" / "data"
        assert f"--questions {data / 'questions-test'} --sentences {data / 'voice-test'}" in words["evaluate"]
        assert "--judge some/whisper --limit 150" in words["evaluate"]
        assert words["report"] == f"report {made.runs} --out {made.report}" and found[-1].name == "report"
    assert "echo" not in {step.name for step in steps(project(tmp_path, voice, None), 200)}


def test_without_a_judge_there_are_no_test_no_scores_and_no_report(
    tmp_path: Path, voice: Path, questions: Path
) -> None:
    unjudged = [step.name for step in steps(project(tmp_path, voice, questions, judge=None), 200)]
    assert unjudged[-1] == "listen" and not any("test" in name for name in unjudged)


def test_a_judge_that_is_named_later_leaves_the_training_alone(tmp_path: Path, voice: Path, questions: Path) -> None:
    commands, made = Commands(), project(tmp_path / "mine", voice, questions, gpus=8)
    heard = Recordings(voice, "x", count=100, hours=1.0)
    store.write_recipes(made, recipes(made, LLM, heard, sizes(heard, heard, 8)))
    for step in steps(made, 200):
        if step.makes is not None:
            step.makes.mkdir(parents=True, exist_ok=True)
    run(made.folder, steps(replace(made, judge=None), 200), print, cluster=True, runner=commands)
    commands.ran.clear()
    said: list[str] = []
    run(made.folder, steps(made, 200), said.append, cluster=True, runner=commands)
    again = [line.split("] ")[1].split(":")[0] for line in said if "running" in line]
    assert again == ["voice-test", "questions-test", "evaluate", "report"]


def test_a_recording_that_a_list_names_is_looked_at_like_one_in_a_folder(tmp_path: Path, voice: Path) -> None:
    rows = [{"audio": "00.wav", "text": "a"}, {"audio": "01.flac", "text": "b"}, {"audio": "gone.wav", "text": "c"}]
    listed = put_lines(voice / "list.jsonl", rows)
    assert {path.name for path in sounds(listed, "tts")} == {"00.wav", "01.flac", "gone.wav"}
    assert sounds(voice, "tts") == (), "a folder is looked through itself"
    asked = put_lines(tmp_path / "questions.jsonl", [{"text": "who?", "answer_text": "I."}])

    def done_again(change: Path | None) -> set[str]:
        if change is not None:
            put(change, encoded(clip(9, 2.0, 22_050), 22_050, "WAV"))
        said: list[str] = []
        run(tmp_path, some(), said.append, runner=Commands())
        return {line.split("] ")[1].split(":")[0] for line in said if "running" in line}

    def some() -> list[Step]:
        found = steps(project(tmp_path, listed, asked), 200)
        return [replace(step, makes=None) for step in found if step.trains is None and step.after != ("s2t",)][:8]

    of_voice = {"voice", "units", "voice-train", "voice-valid", "voice-test", "unit-language"}
    assert done_again(None) == of_voice | {"questions-train", "questions-valid"} and done_again(None) == set()
    assert done_again(voice / "00.wav") == of_voice
    assert done_again(voice / "gone.wav") == of_voice
    assert done_again(voice / "02.ogg") == set(), "which the list does not name"


def test_a_cluster_trains_as_jobs(tmp_path: Path, voice: Path, questions: Path) -> None:
    heard = Recordings(voice, "x", count=100, hours=1.0)
    made = project(tmp_path / "mine", voice, questions)
    size = sizes(heard, heard, 0)
    store.write_recipes(made, recipes(made, LLM, heard, size))
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


def test_a_vocoder_whose_recipe_changed_is_kept_aside_and_made_again(
    tmp_path: Path, voice: Path, questions: Path
) -> None:
    heard = Recordings(voice, "x", count=100, hours=1.0)
    made = project(tmp_path / "mine", voice, questions)
    store.write_recipes(made, recipes(made, LLM, heard, sizes(heard, heard, 0)))
    recipe = made.folder / "vocoder.yaml"
    step = next(step for step in steps(made, 200) if step.name == "vocoder")
    alone, done = [replace(step, after=())], list[str]()

    def train(words: Sequence[str], processes: int) -> None:
        """Leaves what a training leaves: a checkpoint of the recipe, unless there is one."""
        done.append(" ".join(words))
        manifest = made.vocoder.parent / "checkpoints" / "step-00001000" / "manifest.json"
        assert not manifest.exists(), "a training that finds another recipe's checkpoint refuses to go on"
        put(manifest, json.dumps({"step": 1000, "recipe": resolved(load_voice(recipe))}))
        made.vocoder.mkdir()

    assert run(made.folder, alone, print, runner=train) == 1 and run(made.folder, alone, print, runner=train) == 0
    put(recipe, recipe.read_text().replace("lr: 1.0e-3", "lr: 5.0e-4"))
    said: list[str] = []
    assert run(made.folder, alone, said.append, runner=train) == 1
    assert "vocoder: the recipe changed; the earlier run is kept in" in "\n".join(said)
    [aside] = (made.runs / "replaced").iterdir()
    assert aside.name.startswith("vocoder-") and (aside / "vocoder").is_dir()
    assert done == [f"vocoder train {recipe}"] * 2


def test_what_the_gpus_will_do_is_predicted_as_plan_does(tmp_path: Path, voice: Path) -> None:
    heard = Recordings(voice, "x", count=3600, hours=4.0, characters=3600 * 80)
    asked = Recordings(voice, "x", count=900, hours=2.5, characters=900 * 200)
    models = tmp_path / "models"
    write_models(models)
    made = replace(
        project(tmp_path / "mine", voice, voice, gpus=8), llm=str(models / "llm"), whisper=str(models / "whisper")
    )
    texts = recipes(made, LLM, heard, sizes(heard, asked, 8))
    written = store.write_recipes(made, texts)
    stages = {each.stage: each for each in written.values() if isinstance(each, Recipe)}
    sample = {"t2c": Sample(question_s=4.0, reply=20)}
    hours = {
        stage: found.steps * found.step_s / 3600
        for stage, recipe in stages.items()
        for found in [
            forecast(recipe, GPUS["l40s"], "l40s", 8, sample=sample.get(stage, Sample(question_s=10.0, reply=50)))
        ]
    }
    said = list(costs({str(stage): each for stage, each in stages.items()}, "l40s", 8, heard, asked))
    each = ", ".join(f"{stage} {taken:.2f} h" for stage, taken in hours.items())
    assert set(hours) == {"s2t", "t2c", "echo"} and min(hours.values()) > 0
    assert said[-1].startswith(f"to expect on 8 x l40s: {each}, {8 * sum(hours.values()):.2f} GPU hours in all")
    gone = {"s2t": stages["s2t"].model_copy(update={"model": load_recipe("3b/s2t").model})}
    other = gone["s2t"].model.llm.model_copy(update={"path": "no/such"})
    gone["s2t"] = gone["s2t"].model_copy(update={"model": gone["s2t"].model.model_copy(update={"llm": other})})
    [line] = costs(gone, "l40s", 8, heard, None)
    assert line.startswith("hours of s2t on 8 x l40s cannot be predicted: model no/such")
    silent = sample_of(Recordings(voice, "x", count=5, silent=5, unanswered=5))
    assert silent == Sample(), "what is not known is as `echox plan` assumes it"


def test_thirty_recordings_in_six_formats_and_three_broken_ones_become_three_parts(tmp_path: Path, voice: Path) -> None:
    made = project(tmp_path / "mine", voice, None, held_out=share_held_out(look_at(voice, "tts")))
    made = replace(made, questions=voice)  # without questions there is no test
    for number in range(3):  # without --transcribe they would be left out, too
        put(voice / f"{number:02d}.txt", f"sentence {number}")
    rows: dict[str, int] = {}
    for part in ("train", "valid", "test"):
        words = list(next(step for step in steps(made, 9) if step.name == f"voice-{part}").words)
        units = words.index("--units")  # a network would have to make them
        del words[units : units + 2]
        assert cli.main([*words, "--workers", "1"]) == 0
        described = json.loads((made.folder / "data" / f"voice-{part}" / "dataset.json").read_text())
        rows[part] = described["samples"]
    assert sum(rows.values()) == 30 and min(rows.values()) >= 2, rows
