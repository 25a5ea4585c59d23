"""Scores a speech-to-speech run on held-out shard folders: what it understood, knew and said aloud.

Text and speech are judged on the same answers: `s2t_acc` looks for a right answer in the text, `s2s_acc` in what an
independent ASR model hears in the speech, `wer` compares that transcript with the model's own text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from echox.audio.io import read_audio, resample
from echox.evaluate.text import answer_match, wer
from echox.stream.storage.store import Sample, ShardStore, open_catalogue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.pipeline import SpeechToSpeech

Clips = Sequence["NDArray[np.float32]"]
Progress = Callable[[int, int], None]


class Transcriber(Protocol):
    """An ASR model that is not the one in the loop."""

    def transcribe(self, audio: list[NDArray[np.float32]]) -> list[str]:
        """Text of 16 kHz mono clips."""
        ...


class Speaker(Protocol):
    """A vocoder: units to waveforms."""

    sample_rate: int

    def __call__(
        self, units: Sequence[NDArray[np.uint16]], durations: Sequence[NDArray[np.uint16]] | None = None
    ) -> list[NDArray[np.float32]]:
        """Waveforms of unit sequences."""
        ...


@dataclass(frozen=True)
class SpokenItem:
    """One question and what became of it; audio is 16 kHz mono."""

    id: str
    question: str
    question_audio: NDArray[np.float32]
    golds: list[str]
    reference: str
    text: str
    answer_audio: NDArray[np.float32] | None = None
    heard: str = ""

    @property
    def text_right(self) -> bool:
        """A gold answer stands in the model's text."""
        return answer_match(self.text, self.golds)

    @property
    def speech_right(self) -> bool:
        """A gold answer stands in the judge's transcript of the model's speech."""
        return answer_match(self.heard, self.golds)


@dataclass(frozen=True)
class SetScore:
    """Scores of one held-out set; shares are 0 to 1, None where the set does not define them.

    Attributes:
        n: items.
        text_llm_acc: the text LLM alone, asked in writing: the ceiling.
        s2t_acc, s2s_acc: right answers in the model's text, and in its speech as the judge hears it.
        retention: s2s_acc over s2t_acc: what speaking keeps of what was known.
        wer: judge's transcript against the model's own text; for ASR sets, model's transcript against the reference.
        items: the single results.
    """

    n: int
    text_llm_acc: float | None
    s2t_acc: float | None
    s2s_acc: float | None
    retention: float | None
    wer: float
    items: list[SpokenItem] = field(repr=False, default_factory=list)

    def row(self) -> dict[str, float | int | None]:
        """The scores without the items."""
        names = ("n", "text_llm_acc", "s2t_acc", "s2s_acc", "retention", "wer")
        return {name: getattr(self, name) for name in names}


def score_questions(
    model: SpeechToSpeech,
    samples: Sequence[Sample],
    vocoder: Speaker,
    judge: Transcriber,
    *,
    text_llm_acc: float | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> SetScore:
    """Ask every question by voice, let the model speak, let the judge listen."""
    items: list[SpokenItem] = []
    for chunk in _chunks(samples, batch):
        questions = [read_audio(sample["question.flac"]) for sample in chunk]
        answers = model.answer(questions)
        spoken = [resample(wave, vocoder.sample_rate) for wave in vocoder([answer.units for answer in answers])]
        heard = judge.transcribe(spoken)
        for sample, question, answer, wave, words in zip(chunk, questions, answers, spoken, heard, strict=True):
            items.append(_item(sample, question, answer.text, wave, words))
        if progress:
            progress(len(items), len(samples))
    s2t = float(np.mean([item.text_right for item in items]))
    s2s = float(np.mean([item.speech_right for item in items]))
    return SetScore(
        n=len(items),
        text_llm_acc=text_llm_acc,
        s2t_acc=s2t,
        s2s_acc=s2s,
        retention=s2s / s2t if s2t else None,
        wer=wer([item.text for item in items], [item.heard for item in items]),
        items=items,
    )


def score_transcription(
    model: SpeechToSpeech, samples: Sequence[Sample], *, batch: int = 16, progress: Progress | None = None
) -> SetScore:
    """Word error rate of the model's transcripts of recordings."""
    items: list[SpokenItem] = []
    for chunk in _chunks(samples, batch):
        clips = [read_audio(sample["question.flac"]) for sample in chunk]
        for sample, clip, text in zip(chunk, clips, model.write(clips, "asr"), strict=True):
            items.append(_item(sample, clip, text, None, ""))
        if progress:
            progress(len(items), len(samples))
    rate = wer([item.reference for item in items], [item.text for item in items])
    return SetScore(len(items), None, None, None, None, rate, items)


def resynthesis_wer(
    samples: Sequence[Sample],
    vocoder: Speaker,
    judge: Transcriber,
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """The vocoder's ceiling: WER of true units spoken again, and of the original audio, under the same judge."""
    references, again, original = [], [], []
    for chunk in _chunks(samples, batch):
        units = [np.frombuffer(sample["answer.units"], dtype="<u2") for sample in chunk]
        waves = [resample(wave, vocoder.sample_rate) for wave in vocoder(units)]
        references += [sample.meta["answer_text"] for sample in chunk]
        again += judge.transcribe(waves)
        original += judge.transcribe([read_audio(sample["answer.flac"]) for sample in chunk])
        if progress:
            progress(len(references), len(samples))
    return wer(references, again), wer(references, original)


def take(location: str | Path, limit: int | None) -> list[Sample]:
    """At most `limit` samples of a dataset at even distances, so that a cut-down set still covers the whole of it."""
    catalogue = open_catalogue(location)
    count = catalogue.samples if limit is None else min(limit, catalogue.samples)
    indices = np.linspace(0, catalogue.samples - 1, count).round().astype(int)
    store = ShardStore(catalogue)
    try:
        return [store.read(index) for index in indices.tolist()]
    finally:
        store.close()


def _item(
    sample: Sample, question: NDArray[np.float32], text: str, wave: NDArray[np.float32] | None, heard: str
) -> SpokenItem:
    meta = sample.meta
    return SpokenItem(
        id=meta["id"],
        question=meta["question_text"],
        question_audio=question,
        golds=list(meta.get("answers") or [meta["answer_text"]]),
        reference=meta["answer_text"],
        text=text,
        answer_audio=wave,
        heard=heard,
    )


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    ordered = sorted(
        samples, key=lambda sample: float(sample.meta.get("question_s") or sample.meta.get("answer_s") or 0)
    )
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
