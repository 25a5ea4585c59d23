"""Scores a speech-to-speech run on held-out shard folders: what it understood, knew and said aloud.

Text and speech are judged on the same answers, and beside the speech two ceilings under the same vocoder and judge: the
cascade, in which the run's frozen T2C teacher speaks the model's own text, and the copy synthesis of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.audio.io import read_audio
from echox.config.languages import ENGLISH
from echox.evaluate.listening import Listener
from echox.evaluate.normalization import normalize
from echox.evaluate.quality import Dnsmos, rate_voices
from echox.evaluate.scores import SetScore, SpokenItem, question_score, transcription_score
from echox.evaluate.text import wer
from echox.stream.dialogue import heard_turns
from echox.stream.storage.store import Sample, ShardStore, open_catalogue, read_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.pipeline import SpeechToSpeech, SpokenAnswer

    Units = NDArray[np.uint16]

UNITS = "answer.units"
BATCH = 16
RATED = 12
"""Questions of a set whose three voices are rated for quality: 0.7 processor seconds a clip."""

Progress = Callable[[int, int], None]
PhaseProgress = Callable[[str, int, int], None]
"""Called with `answered`, `heard` or `rated`, items done and items in all."""


def labelled(label: str, progress: PhaseProgress | None) -> Progress | None:
    """What is called with done and total alone, and says the label as well."""
    return (lambda done, total: progress(label, done, total)) if progress else None


@dataclass(frozen=True)
class TeacherScore:
    """How well the frozen T2C teacher speaks given texts.

    Attributes:
        wer: judge's transcript against the text.
        exact: share of texts heard as they are, both normalised.
        n: texts.
    """

    wer: float
    exact: float
    n: int


def score_questions(
    model: SpeechToSpeech,
    samples: Sequence[Sample],
    listener: Listener,
    *,
    text_llm_acc: float | None = None,
    copies: Mapping[str, Units] | None = None,
    rater: Dnsmos | None = None,
    rated: int = RATED,
    batch: int = BATCH,
    progress: PhaseProgress | None = None,
) -> SetScore:
    """Ask every question by voice, let the model and its teacher speak, let the judge listen.

    Args:
        model: an echo run.
        samples: questions with `question_text`, `answer_text` and, where known, `answers`, `entity` and `relation`, or
            `fact`, which is "entity|relation".
        listener: vocoder and judge.
        text_llm_acc: the text LLM's score on the same questions.
        copies: units of reference answers by their text, for samples that have no `answer.units`.
        rater: rates how it sounds; None leaves that out.
        rated: most questions whose speech is rated.
        batch: questions answered at once.
        progress: see `PhaseProgress`.
    """
    items: list[SpokenItem] = []
    for chunk in _chunks(samples, batch):
        questions = [read_audio(sample["question.flac"]) for sample in chunk]
        for sample, question, answer in zip(chunk, questions, _answers(model, chunk, questions), strict=True):
            item = _item(sample, question, answer.text, model.recipe.language)
            copy = _reference_units(sample, copies or {})
            items.append(replace(item, units=answer.units, cascade_units=answer.cascade, copy_units=copy))
        if progress:
            progress("answered", len(items), len(samples))
    score = question_score(_heard(items, listener, progress), text_llm_acc)
    if rater is None or not rated:
        return score
    watch = labelled("rated", progress)
    return replace(score, quality=rate_voices(score.items, listener, rater, rated, watch))


def score_transcription(
    model: SpeechToSpeech, samples: Sequence[Sample], *, batch: int = BATCH, progress: Progress | None = None
) -> SetScore:
    """Word error rate of the model's transcripts of recordings."""
    items: list[SpokenItem] = []
    for chunk in _chunks(samples, batch):
        clips = [read_audio(sample["question.flac"]) for sample in chunk]
        written = zip(chunk, clips, model.write(clips, "asr"), strict=True)
        items += [_item(*each, model.recipe.language) for each in written]
        if progress:
            progress(len(items), len(samples))
    return transcription_score(items)


def score_teacher(
    model: SpeechToSpeech, texts: Sequence[str], listener: Listener, *, batch: int = BATCH
) -> TeacherScore:
    """Let the run's frozen T2C teacher speak texts, each as one segment, and compare with what the judge hears."""
    ordered = sorted(texts, key=len)
    units = [each for start in range(0, len(ordered), batch) for each in model.say(ordered[start : start + batch])]
    heard = listener.hear(units)
    language = model.recipe.language
    same = [normalize(text, language) == normalize(words, language) for text, words in zip(ordered, heard, strict=True)]
    return TeacherScore(wer(ordered, heard, language), float(np.mean(same)), len(ordered))


def resynthesis_wer(
    samples: Sequence[Sample],
    listener: Listener,
    *,
    language: str = ENGLISH,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """The vocoder's ceiling: WER of true units spoken again, and of the original audio, under the same judge."""
    references, again, original = [], [], []
    for chunk in _chunks(samples, batch):
        references += [sample.meta["answer_text"] for sample in chunk]
        again += listener.hear([_units(sample) for sample in chunk])
        original += listener.judge.transcribe([read_audio(sample["answer.flac"]) for sample in chunk])
        if progress:
            progress(len(references), len(samples))
    return wer(references, again, language), wer(references, original, language)


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


def spoken_references(locations: Sequence[str | Path], texts: Collection[str]) -> dict[str, Units]:
    """Units of the samples of datasets that hold a spoken answer, for those of the texts that one of them speaks."""
    wanted, found = set(texts), dict[str, "Units"]()
    for location in locations:
        for sample in read_folder(location):
            text = sample.meta.get("answer_text")
            if text in wanted and text not in found and UNITS in sample.members:
                found[text] = _units(sample)
    return found


def entity_of(meta: Mapping[str, Any]) -> list[str]:
    """Accepted forms of what a question is about: its `entity`, else the first part of `fact` ("Ghana|continent")."""
    given = meta.get("entity") or str(meta.get("fact") or "").partition("|")[0]
    return ([given] if given else []) if isinstance(given, str) else list(given)


def relation_of(meta: Mapping[str, Any]) -> str:
    """What is asked: its `relation`, else the second part of `fact`."""
    return str(meta.get("relation") or str(meta.get("fact") or "").partition("|")[2])


def _answers(
    model: SpeechToSpeech, chunk: Sequence[Sample], questions: Sequence[NDArray[np.float32]]
) -> list[SpokenAnswer]:
    turns = [heard_turns(sample) for sample in chunk]
    return model.answer(questions, turns=turns if any(turns) else None, cascade=True)


def _heard(items: Sequence[SpokenItem], listener: Listener, progress: PhaseProgress | None) -> list[SpokenItem]:
    """The items with what the judge hears of their speech, of the cascade and of the copies."""
    spoken = [(item.units, item.cascade_units, item.copy_units) for item in items]
    watch = labelled("heard", progress)
    # All before the first is looked up: equal sequences are judged once, and those of like length together.
    listener.hear([units for three in spoken for units in three if units is not None], watch)

    def transcript(units: Units | None) -> str | None:
        return None if units is None else listener.hear([units])[0]

    return [
        replace(
            item,
            heard=transcript(own) or "",
            cascade_heard=transcript(cascade),
            copy_heard=transcript(copy),
        )
        for item, (own, cascade, copy) in zip(items, spoken, strict=True)
    ]


def _reference_units(sample: Sample, copies: Mapping[str, Units]) -> Units | None:
    return _units(sample) if UNITS in sample.members else copies.get(sample.meta["answer_text"])


def _units(sample: Sample) -> Units:
    return np.frombuffer(sample[UNITS], dtype="<u2")


def _item(sample: Sample, question: NDArray[np.float32], text: str, language: str) -> SpokenItem:
    meta = sample.meta
    return SpokenItem(
        id=meta["id"],
        question=meta["question_text"],
        question_audio=question,
        golds=list(meta.get("answers") or [meta["answer_text"]]),
        reference=meta["answer_text"],
        text=text,
        entity=entity_of(meta),
        relation=relation_of(meta),
        language=language,
    )


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    ordered = sorted(
        samples, key=lambda sample: float(sample.meta.get("question_s") or sample.meta.get("answer_s") or 0)
    )
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
