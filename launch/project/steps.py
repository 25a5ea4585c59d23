"""Lists the steps of a project: the command of each, what it reads and makes, and which steps it hangs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.project.look import sounds
from launch.project.plan import Project

MOST_BROKEN = "0.3"
"""Share of a stranger's recordings that may be broken."""
MOST_BROKEN_HELD_OUT = "0.9"
"""The same of the few that are held out, on which chance may put most of the broken ones."""
MOST_ASKED = "150"
"""Questions of the test that are asked, at even distances: the answers of more would take hours on a processor."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of it.
        words: of the `echox` command.
        reads: files and folders beside those of the steps before it.
        after: steps whose result it uses.
        trains: recipe that it trains, which a cluster can do.
        makes: what is there when it is done; None where that is not looked at.
    """

    name: str
    words: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    trains: Path | None = None
    makes: Path | None = None


def steps(project: Project, clusters: int) -> list[Step]:
    """All steps, each behind those that it hangs on.

    Args:
        project: whose.
        clusters: speech units.

    Raises:
        DataError: a list of recordings or of questions cannot be read.
    """
    return [*_voice(project, clusters), *_hearing(project), *_vocoder(project), *_showing(project)]


def _build(project: Project, name: str, source: Path, task: str, part: str, *more: str) -> tuple[str, ...]:
    """The command that makes shards of a part of a list."""
    shares = ("--valid-share", f"{project.held_out:g}", "--test-share", f"{project.held_out:g}")
    broken = MOST_BROKEN if part == "train" else MOST_BROKEN_HELD_OUT
    out = ("--out", str(_shards(project, name, part)), "--replace", "--max-rejected", broken)
    written = ("--transcribe", project.recogniser) if project.recogniser else ()
    spoken = ("--language", project.language) if project.recogniser and project.language else ()
    listed = ("--source", str(source), "--task", task, "--part", part, *shares)
    return ("shards", "build", "manifest", *listed, *out, *written, *spoken, *more)


def _shards(project: Project, name: str, part: str) -> Path:
    return project.folder / "data" / f"{name}-{part}"


def _parts(project: Project) -> tuple[str, ...]:
    """The parts of a list; the test is left out where nothing could score it."""
    return ("train", "valid", "test") if project.judge is not None else ("train", "valid")


def _voice(project: Project, clusters: int) -> Iterator[Step]:
    """Shards of the voice, its units and its unit language."""
    units, language = project.folder / "units", project.folder / "unit_language.json"
    train = _shards(project, "voice", "train")
    reads = (project.voice, *sounds(project.voice, "tts"))
    with_audio = _build(project, "voice", project.voice, "tts", "train", "--keep-answer-audio")
    yield Step("voice", with_audio, reads, makes=train)
    fit = ("units", "fit", str(train), str(units), "--model", project.whisper, "--clusters", str(clusters))
    yield Step("units", fit, after=("voice",), makes=units)
    for part in _parts(project):
        if part == "test" and project.questions is None:
            continue
        words = _build(project, "voice", project.voice, "tts", part, "--units", str(units), "--keep-answer-audio")
        yield Step(f"voice-{part}", words, reads, ("units",), makes=_shards(project, "voice", part))
    words = ("unit-language", "fit", str(train), str(language), "--clusters", str(clusters))
    yield Step("unit-language", words, after=("voice-train",), makes=language)


def _hearing(project: Project) -> Iterator[Step]:
    """Shards of the questions, and the three stages; nothing where there are no questions."""
    if project.questions is None:
        return
    reads = (project.questions, *sounds(project.questions, "sqa"))
    speak = ("--speak", str(project.speaker)) if project.speaker else ()
    for part in _parts(project):
        words = _build(project, "questions", project.questions, "sqa", part, *speak)
        yield Step(f"questions-{part}", words, reads, makes=_shards(project, "questions", part))
    heard: tuple[str, ...] = ("questions-train", "questions-valid")
    s2t, t2c, echo = (project.folder / f"{stage}.yaml" for stage in ("s2t", "t2c", "echo"))
    if not project.gpus:
        yield Step("encode", ("shards", "encode", str(s2t)), (), heard)
        heard = ("encode",)
    of_voice = ("voice-train", "voice-valid", "unit-language")
    yield Step("s2t", ("train", str(s2t)), (s2t,), heard, s2t, project.run("s2t"))
    yield Step("t2c", ("train", str(t2c)), (t2c,), of_voice, t2c, project.run("t2c"))
    yield Step("respond", ("respond", str(echo)), (), ("s2t",))
    yield Step("echo", ("train", str(echo)), (echo,), ("s2t", "t2c", "respond"), echo, project.run("echo"))


def _vocoder(project: Project) -> Iterator[Step]:
    recipe, after = project.folder / "vocoder.yaml", ("voice-train", "voice-valid")
    yield Step("vocoder", ("vocoder", "train", str(recipe)), (recipe,), after, recipe, project.vocoder)


def _showing(project: Project) -> Iterator[Step]:
    """What people hear and read of the model."""
    if project.questions is None:
        return
    run, vocoder = str(project.run("echo")), ("--vocoder", str(project.vocoder))
    yield Step("listen", ("listen", run, *vocoder), after=("echo", "vocoder", "questions-valid"))
    if project.judge is None:
        return
    asked = ("--questions", str(_shards(project, "questions", "test")))
    said = ("--sentences", str(_shards(project, "voice", "test")))
    after = ("echo", "vocoder", "questions-test", "voice-test")
    scores = project.runs / "evaluation"
    words = ("evaluate", run, *asked, *said, *vocoder, "--judge", project.judge, "--limit", MOST_ASKED)
    yield Step("evaluate", words, after=after, makes=scores)
    report = ("report", str(project.runs), "--out", str(project.report))
    yield Step("report", report, after=("evaluate",), makes=project.report)
