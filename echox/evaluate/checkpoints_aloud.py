"""Lets every checkpoint of a run answer the same few questions aloud, so that one hears the run learn.

It runs beside the training and touches nothing of it: it reads complete checkpoints, and writes a folder of its own,
from which it goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echox.audio.io import SAMPLE_RATE, read_audio, write_audio
from echox.engine.checkpoint.manifest import MANIFEST, list_checkpoints, step_of
from echox.errors import CheckpointError, DataError
from echox.evaluate.listening import speak
from echox.evaluate.spoken import take
from echox.files import read_record, write_atomically
from echox.html import player, write_page

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.evaluate.listening import Speaker
    from echox.speak.pipeline import SpokenAnswer

RECORD, PAGE = "heard.json", "listen.html"
QUESTION = "question-{}.wav"
ANSWER = "{}/answer-{}.wav"


class Model(Protocol):
    """A loaded checkpoint."""

    def answer(self, clips: Sequence[NDArray[np.float32]]) -> list[SpokenAnswer]:
        """Answers to 16 kHz mono questions."""
        ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every checkpoint is asked: 16 kHz mono audio, its words and an answer, where known."""

    id: str
    text: str
    reference: str
    audio: NDArray[np.float32]

    def record(self) -> dict[str, str]:
        """What tells it from others."""
        digest = hashlib.sha256(np.ascontiguousarray(self.audio, "<f4").tobytes()).hexdigest()
        return {"id": self.id, "text": self.text, "reference": self.reference, "sha256": digest}


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer of one checkpoint.

    Attributes:
        text: the model's own text.
        seconds: of speech.
        failed: segments that could not be spoken.
    """

    text: str
    seconds: float
    failed: int


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one checkpoint said.

    Attributes:
        step: optimizer steps behind it.
        manifest: sha256 of its manifest; a step that was trained again after a crash has another.
        said: its answers, in the order of the questions.
    """

    step: int
    manifest: str
    said: list[Said]

    def metrics(self) -> dict[str, float]:
        """`listen/speech_s`, the mean length of an answer, and `listen/silent_share`."""
        seconds = [each.seconds for each in self.said]
        return {
            "listen/speech_s": float(np.mean(seconds)),
            "listen/silent_share": float(np.mean([second == 0 for second in seconds])),
        }


def questions_of(dataset: str | Path, count: int) -> list[Question]:
    """At most `count` questions of a dataset, at even distances.

    Raises:
        DataError: its samples hold no spoken questions.
    """
    samples = take(dataset, count)
    if not samples or "question.flac" not in samples[0].members:
        fix = "name a dataset of spoken questions, or sound files with --question"
        raise DataError("there is no spoken question", where=str(dataset), fix=fix)
    return [
        Question(
            id=str(sample.meta["id"]),
            text=str(sample.meta.get("question_text") or ""),
            reference=str(sample.meta.get("answer_text") or ""),
            audio=read_audio(sample["question.flac"]),
        )
        for sample in samples
    ]


def files_as_questions(files: Sequence[Path]) -> list[Question]:
    """A question for each sound file, by its name."""
    return [Question(id=path.name, text=path.stem, reference="", audio=read_audio(path)) for path in files]


class CheckpointsAloud:
    """The folder of what the checkpoints of a run said to some questions.

    Args:
        folder: for sounds, record and page; made where there is none.
        questions: the same at every call.
        load: opens a checkpoint folder; raises CheckpointError for one that is damaged or gone.
        vocoder: speaks the answers.

    Raises:
        DataError: the folder holds answers to other questions.
    """

    def __init__(
        self, folder: Path, questions: Sequence[Question], load: Callable[[Path], Model], vocoder: Speaker
    ) -> None:
        self.folder, self.questions = folder, list(questions)
        self._load, self._vocoder = load, vocoder
        asked = [question.record() for question in self.questions]
        known = read_record(folder, RECORD)
        if known and known.get("questions") != asked:
            raise DataError(
                "it holds answers to other questions", where=str(folder), fix="name another folder with --out"
            )
        try:
            self.heard = {row["step"]: _heard(row, len(asked)) for row in known.get("heard", ())}
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"its record is none: {error}", where=str(folder / RECORD), fix="remove it") from error
        self._damaged: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for number, question in enumerate(self.questions):
            write_audio(folder / QUESTION.format(number), question.audio)

    def look(self, run: Path, say: Callable[[str], None]) -> list[Heard]:
        """Ask each complete checkpoint of a run that was not asked yet, the oldest first, and write the page again.

        A checkpoint that is gone before it could be read, as older ones are while a run trains, is passed over.

        Returns:
            What is new.
        """
        new = []
        for checkpoint in reversed(list_checkpoints(run)):
            try:
                manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
            except OSError:
                continue
            step = step_of(checkpoint)
            if manifest in self._damaged or (step in self.heard and self.heard[step].manifest == manifest):
                continue
            try:
                model = self._load(checkpoint)
            except CheckpointError as error:
                if checkpoint.is_dir():
                    self._damaged.add(manifest)
                    say(f"{checkpoint.name} is passed over: {error}")
                continue
            new.append(self._ask(model, step, manifest))
        return new

    def files(self, heard: Heard) -> list[Path]:
        """The sound files of one checkpoint's answers that are not silent."""
        return [self._answer(heard.step, number) for number, said in enumerate(heard.said) if said.seconds]

    def _answer(self, step: int, number: int) -> Path:
        return self.folder / ANSWER.format(f"step-{step:08d}", number)

    def _ask(self, model: Model, step: int, manifest: str) -> Heard:
        said = []
        for number, answer in enumerate(model.answer([question.audio for question in self.questions])):
            wave = np.zeros(0, np.float32)
            if len(answer.units):
                (wave,) = speak(self._vocoder, [answer.units])
                self._answer(step, number).parent.mkdir(exist_ok=True)
                write_audio(self._answer(step, number), wave)
            seconds = round(len(wave) / SAMPLE_RATE, 3)
            said.append(Said(text=answer.text, seconds=seconds, failed=len(answer.failed)))
        heard = self.heard[step] = Heard(step=step, manifest=manifest, said=said)
        rows = [asdict(self.heard[each]) for each in sorted(self.heard)]
        record: Mapping[str, Any] = {"questions": [each.record() for each in self.questions], "heard": rows}
        write_atomically(self.folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        self._write_page()
        return heard

    def _write_page(self) -> None:
        parts = [
            "<h1>How the run learns to speak</h1>",
            "<p>The same questions, answered by each checkpoint. Newest first.</p>",
        ]
        for number, question in enumerate(self.questions):
            rows = "".join(
                f"<tr><td>{step}</td><td>{html.escape(said.text) or '<i>(nothing)</i>'}{_failed(said)}</td>"
                f"<td>{self._player(self._answer(step, number)) if said.seconds else 'silent'}</td></tr>"
                for step in sorted(self.heard, reverse=True)
                for said in self.heard[step].said[number : number + 1]
            )
            reference = (
                f'<p class="soft">Reference: {html.escape(question.reference)}</p>' if question.reference else ""
            )
            parts.append(
                f"<h2>{html.escape(question.text or question.id)}</h2>"
                f"{self._player(self.folder / QUESTION.format(number))}{reference}"
                f"<table><tr><th>step</th><th>text</th><th>speech</th></tr>{rows}</table>"
            )
        write_page(self.folder / PAGE, "EchoX: checkpoints aloud", parts)

    @staticmethod
    def _player(path: Path) -> str:
        return player(path.read_bytes() if path.is_file() else None)


def _failed(said: Said) -> str:
    return f' <span class="soft">({said.failed} segments failed)</span>' if said.failed else ""


def _heard(row: Mapping[str, Any], questions: int) -> Heard:
    """A row of the record, which may be someone else's."""
    said = [
        Said(text=str(each["text"]), seconds=float(each["seconds"]), failed=int(each["failed"])) for each in row["said"]
    ]
    if len(said) != questions or not 0 <= int(row["step"]) < 1 << 40:
        raise ValueError("a checkpoint has another number of answers than there are questions, or no step")
    return Heard(step=int(row["step"]), manifest=str(row["manifest"]), said=said)
