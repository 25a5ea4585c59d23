"""Lists the steps of a project: the command of each, what it reads, and which steps it hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.project.plan import Project

VALID_SHARE = "0.05"
MOST_BROKEN = "0.3"
"""Share of a stranger's recordings that may be broken."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of it.
        words: of the `echox` command.
        reads: files and folders beside those of the steps before it.
        after: steps whose result it uses.
        trains: recipe that it trains, which a cluster can do.
    """

    name: str
    words: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    trains: Path | None = None


def steps(project: Project, clusters: int) -> list[Step]:
    """All steps, each behind those that it hangs on."""
    folder, data = project.folder, project.folder / "data"
    units, language = folder / "units", folder / "unit_language.json"
    made: list[Step] = []

    def build(name: str, source: Path, task: str, part: str, *more: str) -> tuple[str, ...]:
        given = ("--transcribe", project.recogniser) if project.recogniser else ()
        spoken = ("--language", project.language) if project.recogniser and project.language else ()
        listed = ("--source", str(source), "--task", task, "--part", part, "--valid-share", VALID_SHARE)
        out = ("--out", str(data / f"{name}-{part}"), "--replace", "--max-rejected", MOST_BROKEN)
        return ("shards", "build", "manifest", *listed, *out, *given, *spoken, *more)

    voice = project.voice
    made.append(Step("voice", build("voice", voice, "tts", "train", "--keep-answer-audio"), (voice,)))
    fit = (
        "units",
        "fit",
        str(data / "voice-train"),
        str(units),
        "--model",
        project.whisper,
        "--clusters",
        str(clusters),
    )
    made.append(Step("units", fit, after=("voice",)))
    for part in ("train", "valid"):
        words = build("voice", voice, "tts", part, "--units", str(units), "--keep-answer-audio")
        made.append(Step(f"voice-{part}", words, (voice,), ("units",)))
    words = ("unit-language", "fit", str(data / "voice-train"), str(language), "--clusters", str(clusters))
    made.append(Step("unit-language", words, after=("voice-train",)))
    if project.questions is not None:
        for part in ("train", "valid"):
            speak = ("--speak", str(project.speaker)) if project.speaker else ()
            words = build("questions", project.questions, "sqa", part, *speak)
            made.append(Step(f"questions-{part}", words, (project.questions,)))
        made += _stages(project)
    recipe = folder / "vocoder.yaml"
    after = ("voice-train", "voice-valid")
    made.append(Step("vocoder", ("vocoder", "train", str(recipe)), (recipe,), after, trains=recipe))
    if project.questions is not None:
        run, voiced = folder / "runs" / "echo", folder / "runs" / "vocoder" / "vocoder"
        words = ("listen", str(run), "--vocoder", str(voiced))
        made.append(Step("listen", words, after=("echo", "vocoder", "questions-valid")))
    return made


def _stages(project: Project) -> Sequence[Step]:
    folder, asked = project.folder, ("questions-train", "questions-valid")
    s2t, t2c, echo = (folder / f"{stage}.yaml" for stage in ("s2t", "t2c", "echo"))
    encoded = [] if project.gpus else [Step("encode", ("shards", "encode", str(s2t)), (), asked)]
    heard = ("encode",) if encoded else asked
    return [
        *encoded,
        Step("s2t", ("train", str(s2t)), (s2t,), heard, trains=s2t),
        Step("t2c", ("train", str(t2c)), (t2c,), ("voice-valid", "unit-language"), trains=t2c),
        Step("respond", ("respond", str(echo)), (), ("s2t",)),
        Step("echo", ("train", str(echo)), (echo,), ("s2t", "t2c", "respond"), trains=echo),
    ]
