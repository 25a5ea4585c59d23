"""Decides sizes and steps of a project from what it begins with, and says what is missing and what to expect."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.project.look import SHOWN, Llm, Recordings

SMALL_HOURS = 20.0
"""Below, a T2C decoder of the demo's size, with what keeps it from reciting; above, the published one."""
CLUSTERS = ((1.0, 200), (math.inf, 500))
"""Hours of speech up to which a k-means has so many units."""
MEASURED = {1.8: 0.227, 6.7: 0.113}
"""Hours of one voice, and the word error rate of the T2C decoder on new sentences: of the demo, and of `make small`. No
other amount of speech was measured (launch/demo)."""
HELD_OUT, FEW = 0.05, 0.2
"""Share of a list that each of validation and test gets, and the most of a short one."""
LEAST_HELD_OUT = 8
"""Utterances that such a part has in the mean: a test of fewer says nothing, and by chance there might be none."""


@dataclass(frozen=True)
class Project:
    """A project, as `project.yaml` keeps it.

    Attributes:
        folder: of the project, absolute.
        llm: folder or name of the LLM.
        voice: list of recordings of the voice.
        questions: list of questions; None: there are none yet.
        language: of the recordings; None lets models decide.
        whisper: encoder of Stage I and frames of the units.
        recogniser: Whisper that writes down recordings without text; None where none is wanted.
        speaker: Piper voice for questions without sound; None where none is wanted.
        judge: Whisper that scores what the model says; None where there is none.
        held_out: share of recordings and of questions that validation gets, and again that the test gets.
        gpus: of the cluster; 0 trains on this machine's processors.
    """

    folder: Path
    llm: str
    voice: Path
    questions: Path | None
    language: str | None
    whisper: str
    recogniser: str | None
    speaker: Path | None
    judge: str | None
    held_out: float
    gpus: int

    @property
    def title(self) -> str:
        """What its runs are called after: the folder's name, as far as a run may have it."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.folder.name).strip("-._") or "project"

    @property
    def runs(self) -> Path:
        """Folder of its runs."""
        return self.folder / "runs"

    def run(self, stage: str) -> Path:
        """Folder of a stage's run."""
        return self.runs / f"{self.title}-{stage}"

    @property
    def vocoder(self) -> Path:
        """Folder of its vocoder."""
        return self.runs / "vocoder" / "vocoder"

    @property
    def report(self) -> Path:
        """The page that its last step writes."""
        return self.folder / "report.html"


@dataclass(frozen=True)
class Sizes:
    """What the recipes say in numbers.

    Attributes:
        small: whether the T2C decoder is the small one.
        clusters: speech units.
        batch: global.
        s2t_steps, t2c_steps, echo_steps, align_steps: optimizer steps.
        vocoder_steps: of the vocoder.
        workers: processes.
    """

    small: bool
    clusters: int
    batch: int
    s2t_steps: int
    t2c_steps: int
    echo_steps: int
    align_steps: int
    vocoder_steps: int
    workers: int


def share_held_out(*lists: Recordings | None) -> float:
    """Share of each list for validation, and again for the test: more of a short one."""
    least = min((found.count for found in lists if found is not None), default=0)
    return round(min(FEW, max(HELD_OUT, LEAST_HELD_OUT / max(1, least))), 3)


def sizes(voice: Recordings, questions: Recordings | None, gpus: int) -> Sizes:
    """Sizes from the amounts: passes as in the demo's recipes for little data, as in the 3B recipes for much."""
    small = voice.hours < SMALL_HOURS
    batch = 16 if gpus == 0 else 16 * gpus
    asked = questions.usable if questions is not None else 0

    def passes(count: int, times: float, least: int) -> int:
        return max(least, math.ceil(times * count / batch))

    return Sizes(
        small=small,
        clusters=next(count for hours, count in CLUSTERS if voice.hours < hours),
        batch=batch,
        s2t_steps=passes(asked, 5 if small else 1, 60),
        t2c_steps=passes(voice.usable, 20 if small else 10, 200),
        echo_steps=passes(asked, 2 if small else 1, 60),
        align_steps=20 if small else 0,
        vocoder_steps=1000 if gpus == 0 else 100_000,
        workers=max(1, gpus) if gpus else 2,
    )


def remarks(project: Project, llm: Llm, voice: Recordings, questions: Recordings | None) -> Iterator[str]:
    """What was found, what is missing, and what to expect; a line each."""
    yield f"LLM {project.llm}: {llm.parameters / 1e9:.2f} G weights, {llm.layers} layers of {llm.width}"
    if not llm.has_template:
        yield "missing: a chat template in its tokenizer; write model.llm.prompt into the recipes"
    yield from _of("voice", voice, project.recogniser)
    if len(voice.speakers) > 1:
        yield f"the voice has {len(voice.speakers)} speakers by name; it will learn a mixture: leave one"
    yield f"to expect: {_expected(voice.hours)}"
    if questions is None:
        yield "missing: questions with answers, spoken or as text with --speak; name them in project.yaml"
    else:
        yield from _of("questions", questions, project.recogniser)
        if questions.silent and project.speaker is None:
            yield f"missing: a voice (--speak VOICE.onnx) for {questions.silent} questions without sound"
        if questions.unanswered:
            yield f"{questions.unanswered} questions without answer_text are left out"
        yield f"held out: {project.held_out:.0%} of questions and recordings for validation, as many for the test"
        yield _judged(project)


def _expected(hours: float) -> str:
    """Words read wrong, at the amounts of speech that were measured, and on which side of them this voice is."""
    measured = " and ".join(f"{rate:.1%} after {amount:g} h" for amount, rate in MEASURED.items())
    side = "is less: more errors" if hours < min(MEASURED) else "is more" if hours > max(MEASURED) else "lies between"
    return (
        f"words of new sentences that a T2C reads wrong: {measured} of speech, as measured on the demo's voice; "
        f"{hours:.2f} h {side}"
    )


def _judged(project: Project) -> str:
    if project.judge is None:
        return (
            "missing: a judge, a Whisper that scores what the model says: name one as `judge` in project.yaml; "
            "without, there are no scores and no report"
        )
    same = " (which also wrote down the recordings)" if project.judge == project.recogniser else ""
    heard = "; it is the model's own ear: a larger one would be independent" if project.judge == project.whisper else ""
    return f"judge of what the model says: {project.judge}{same}{heard}"


def _of(what: str, found: Recordings, recogniser: str | None) -> Iterator[str]:
    rates = ", ".join(f"{rate} Hz" for rate, _ in found.rates.most_common())
    yield f"{what}, {found.format}: {found.count:,} utterances, {found.hours:.2f} h{f', {rates}' if rates else ''}"
    if found.broken:
        shown = "; ".join(f"{name}: {why}" for name, why in list(found.broken.items())[:SHOWN])
        yield f"{what}: {len(found.broken)} cannot be used and are left out ({shown})"
    if found.untold:
        by = f"will be written down by {recogniser}" if recogniser else "need --transcribe WHISPER, or a text"
        yield f"{what}: {found.untold:,} without text {by}"
