"""Scores how well a T2C run reads held-out sentences aloud, in any language, between a ceiling and a floor.

Four speakers say the same sentences to one judge: the recording; its true units, spoken again by the vocoder; the T2C
decoder from the text; and the true units of another sentence, which is what speech of no relation to the text scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.audio.io import read_audio
from echox.config.paths import resolve_data, resolve_model
from echox.errors import DataError
from echox.evaluate.demo import JUDGE
from echox.evaluate.judges import NamedJudge
from echox.evaluate.listening import Listener
from echox.evaluate.normalization import error_rate_name, normalize
from echox.evaluate.reader import TextReader
from echox.evaluate.resampling import drawn_rates, interval_95
from echox.evaluate.spoken import UNITS, labelled, take
from echox.evaluate.text import wer
from echox.units.identity import UnitPart, read_unit_set

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Units = NDArray[np.uint16]

AT_ONCE = 8
SENTENCES = 40
_SOUND = "answer.flac"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Voice:
    """What the judge hears of one speaker.

    Attributes:
        name: of it.
        rate: errors over reference words, or characters; 1.0 is 100 %.
        interval_95: its percentile bootstrap over the sentences.
        exact: share of sentences heard as they are.
        heard: the transcripts.
    """

    name: str
    rate: float
    interval_95: list[float]
    exact: float
    heard: list[str]


@dataclass(frozen=True)
class ReadAloud:
    """How a T2C run reads.

    Attributes:
        language: that the judge was told, of the run's recipe.
        rate: what the rates are: `WER`, or `CER`.
        judge: the model that listened.
        texts: the sentences.
        voices: recording, true units, T2C, and true units of another sentence.
        unended: share of sentences to which the decoder found no end.
    """

    language: str
    rate: str
    judge: str
    texts: list[str]
    voices: list[Voice]
    unended: float

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"n": len(self.texts), **asdict(self)}


def read_sentences(
    run: Path,
    sentences: str,
    vocoder: Path,
    *,
    speaker: str | None = None,
    judge: str = JUDGE,
    limit: int = SENTENCES,
    progress: Progress | None = None,
) -> ReadAloud:
    """Let a T2C run read sentences of a dataset, and score what is heard.

    Args:
        run: run or checkpoint folder of the t2c stage.
        sentences: dataset with `answer.flac` and `answer.units`, none of which the run was trained on.
        vocoder: vocoder folder.
        speaker: who of its speakers; None for the first.
        judge: Whisper that listens, in the language of the run's recipe.
        limit: most sentences, at even distances.
        progress: called with a phase, sentences done and sentences in all.

    Raises:
        CheckpointError: the run is of another stage.
        DataError: the dataset lacks sound or units, has a single sentence, or is of other units than run or vocoder.
        MissingModelError: vocoder or judge is not there, or the judge does not know the language.
    """
    from echox.speak.vocoder import check_vocoder, load_vocoder

    place, listens = resolve_data(sentences), NamedJudge(judge, resolve_model(judge))
    voice, samples = load_vocoder(vocoder, speaker), take(place, limit)
    lacking = [name for name in (UNITS, _SOUND) if any(name not in sample.members for sample in samples)]
    if lacking or len(samples) < 2:
        what = f"some samples have no {' and no '.join(lacking)}" if lacking else f"{len(samples)} sentence is too few"
        fix = "build it with --units and --keep-answer-audio, of two sentences or more"
        raise DataError(f"they cannot be read aloud: {what}", where=str(place), fix=fix)
    reader = TextReader.load(run)
    check_vocoder(vocoder, [reader.units, UnitPart(sentences, read_unit_set(place))])
    language = reader.recipe.language
    listener = Listener(voice, listens.open(language))
    texts = [str(sample.meta["answer_text"]) for sample in samples]
    said = _said(reader, texts, progress)
    true = [np.frombuffer(sample[UNITS], dtype="<u2") for sample in samples]

    recorded = listener.judge.transcribe([read_audio(sample[_SOUND]) for sample in samples])
    heard = {
        "recording": recorded,
        "true units": listener.hear(true, labelled("true units heard", progress)),
        "T2C": listener.hear([units for units, _ in said], labelled("T2C heard", progress)),
        "another sentence": _shifted(listener.hear(true)),
    }
    voices = [_voice(name, texts, found, language) for name, found in heard.items()]
    unended = float(np.mean([not ended for _, ended in said]))
    return ReadAloud(language, error_rate_name(language), judge, texts, voices, unended)


def lines(found: ReadAloud) -> list[str]:
    """The scores for a terminal."""
    from echox.evaluate.columns import aligned, percent

    rows = [["", found.rate, "95 %", "exact"]]
    for voice in found.voices:
        low, high = voice.interval_95
        rows.append([voice.name, percent(voice.rate), f"{100 * low:.0f}–{100 * high:.0f}", percent(voice.exact)])
    about = (
        f"{len(found.texts)} sentences, judge {found.judge}, language {found.language}; "
        f"without an end: {percent(found.unended)}"
    )
    return [*(line.rstrip() for line in aligned(rows)), about]


def _said(reader: TextReader, texts: Sequence[str], progress: Progress | None) -> list[tuple[Units, bool]]:
    """Units of each text, those of like length together."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, tuple[Units, bool]] = {}
    for start in range(0, len(order), AT_ONCE):
        group = order[start : start + AT_ONCE]
        found |= zip(group, reader.say([texts[index] for index in group]), strict=True)
        if progress:
            progress("read", len(found), len(texts))
    return [found[index] for index in range(len(texts))]


def _shifted(heard: Sequence[str]) -> list[str]:
    """Each sentence gets what is heard of the one before it."""
    return [heard[-1], *heard[:-1]]


def _voice(name: str, texts: Sequence[str], heard: Sequence[str], language: str) -> Voice:
    same = [normalize(text, language) == normalize(said, language) for text, said in zip(texts, heard, strict=True)]
    rate = wer(texts, heard, language)
    return Voice(name, rate, interval_95(drawn_rates(texts, heard, language)), float(np.mean(same)), list(heard))
