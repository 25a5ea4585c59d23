"""Evaluates a run of the demo: scores on its held-out sets, the ceilings of its speech, and samples to listen to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echox.audio.io import encode_wav, read_audio
from echox.config.languages import ENGLISH
from echox.config.paths import cache_dir, resolve_data, resolve_model
from echox.evaluate.commands import evaluate_command
from echox.evaluate.listening import Listener
from echox.evaluate.quality import Dnsmos, spread_over
from echox.evaluate.scores import SetScore, SpokenItem
from echox.evaluate.spoken import (
    RATED,
    TeacherScore,
    labelled,
    resynthesis_wer,
    score_questions,
    score_teacher,
    score_transcription,
    spoken_references,
    take,
)
from echox.evaluate.streaming import score_streaming
from echox.stream.format.catalogue import DATASET_NAME

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.stream.storage.store import Sample

JUDGE = "Xenova/whisper-small"
"""Not the model in the loop: that one hears with Whisper-base."""


@dataclass(frozen=True)
class HeldOutSet:
    """A set of questions below the demo's corpus.

    Attributes:
        name: its folder.
        role: `validation` for a set that choices were made on, `test` for one that was used for nothing else.
        about: what is held out, for readers.
    """

    name: str
    role: Literal["validation", "test"]
    about: str


QUESTION_SETS = (
    HeldOutSet(
        "sqa-heldout-phrasing",
        "test",
        "phrasings and voices never heard in training, about facts that were",
    ),
    HeldOutSet(
        "sqa-heldout-knowledge",
        "test",
        "countries whose facts are in no training sample: only the text model itself can know",
    ),
    HeldOutSet(
        "sqa-heldout-open",
        "test",
        "open questions in phrasings and voices never heard in training, answered in two sentences",
    ),
)
ASR_SET = HeldOutSet("asr-heldout-real", "test", "recordings of real people, to be transcribed")
RESYNTHESIS_SET = "tts-heldout"
RESYNTHESIS_ITEMS = 40
PER_SET = 6
STREAMED = 10
"""Questions whose answers are timed."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """All scores of one run.

    Attributes:
        sets: held-out set and its scores.
        resynthesis_wer, original_wer: true units spoken again, and the original audio, under the same judge.
        teacher: the frozen T2C teacher on the texts of the same sentences.
        spoken: questions with players' WAV bytes, some of every set, wrong answers included.
        streaming: see `score_streaming`; empty where nothing was asked.
        command: the command that makes these numbers.
        judge: the model that listened.
        corpus: whose sets these are.
        language: of the run, by Whisper's code: what the judge was told.
    """

    sets: dict[HeldOutSet, SetScore]
    resynthesis_wer: float
    original_wer: float
    teacher: TeacherScore
    spoken: list[dict[str, Any]]
    streaming: dict[str, float] = field(default_factory=dict)
    command: str = ""
    judge: str = JUDGE
    corpus: str = "demo"
    language: str = ENGLISH

    def to_json(self) -> dict[str, Any]:
        """Scores without audio."""
        rows = {each.name: {**asdict(each), **score.row()} for each, score in self.sets.items()}
        for row in rows.values():
            del row["name"]
        return {
            "sets": rows,
            "resynthesis_wer": self.resynthesis_wer,
            "original_wer": self.original_wer,
            **{f"t2c_heldout_{name}": value for name, value in asdict(self.teacher).items()},
            "streaming": self.streaming,
            "command": self.command,
            "judge": self.judge,
            "corpus": self.corpus,
            "language": self.language,
        }

    def samples(self) -> list[dict[str, Any]]:
        """What the report plays."""
        return self.spoken


def evaluate_demo(
    run: Path,
    *,
    questions: Sequence[HeldOutSet] = QUESTION_SETS,
    vocoder: Path | None = None,
    speaker: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    corpus: str = "demo",
    rated: int = RATED,
) -> Evaluation:
    """Score an echo run of the demo on its held-out sets.

    Args:
        run: run or checkpoint folder of the echo stage.
        questions: sets of spoken questions; those that are not on disk are left out.
        vocoder: vocoder folder; default: the demo's.
        speaker: name or number of who speaks, in a vocoder of several; None: the first.
        limit: most items of each set.
        progress: called with phase, items done and items in all.
        corpus: folder of the sets below `data/` of the cache: `demo`, or `small`, whose questions are the same.
        rated: questions of each set whose speech is rated by DNSMOS, where that was fetched; 0 for none.

    Raises:
        DataError: the vocoder is of other units than the run or the held-out set, or has no such speaker.
    """
    from echox.evaluate.asr import Judge
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, load_vocoder
    from echox.units.identity import UnitPart, read_unit_set

    root = cache_dir() / "data" / corpus
    folder = vocoder or root / "vocoder"
    voice, rater = load_vocoder(folder, speaker), Dnsmos.find() if rated else None
    model = SpeechToSpeech.load(run)
    language = model.recipe.language
    listener = Listener(voice, Judge.load(resolve_model(JUDGE), language=language))
    sentences = resolve_data(f"{corpus}/{RESYNTHESIS_SET}")
    check_vocoder(folder, [model.units, UnitPart(f"{corpus}/{RESYNTHESIS_SET}", read_unit_set(sentences))])
    ceilings = json.loads((root / "corpus.json").read_text()).get("text_llm_acc", {})

    def watch_phases(name: str) -> Callable[[str, int, int], None] | None:
        return (lambda phase, done, total: progress(f"{name} {phase}", done, total)) if progress else None

    asked = {each: take(root / each.name, limit) for each in questions if (root / each.name).is_dir()}
    copies = spoken_references(_spoken_sets(root), _reference_texts(asked))
    sets = {
        each: score_questions(
            model,
            samples,
            listener,
            text_llm_acc=ceilings.get(each.name),
            copies=copies,
            rater=rater,
            rated=rated,
            progress=watch_phases(each.name),
        )
        for each, samples in asked.items()
    }
    if (root / ASR_SET.name).is_dir():
        recordings = take(root / ASR_SET.name, limit)
        sets[ASR_SET] = score_transcription(model, recordings, progress=labelled(ASR_SET.name, progress))
    heldout = take(sentences, min(limit or RESYNTHESIS_ITEMS, RESYNTHESIS_ITEMS))
    again, original = resynthesis_wer(
        heldout, listener, language=language, progress=labelled(RESYNTHESIS_SET, progress)
    )
    teacher = score_teacher(model, [sample.meta["answer_text"] for sample in heldout], listener)
    spoken = [row for each, score in sets.items() for row in played(each.name, score.items, listener)]
    streamed = _streamed_questions(asked)
    streaming = score_streaming(model, listener.vocoder, streamed)
    command = _command(run, vocoder, speaker, limit, corpus, rated)
    return Evaluation(sets, again, original, teacher, spoken, streaming, command, corpus=corpus, language=language)


def _command(run: Path, vocoder: Path | None, speaker: str | None, limit: int | None, corpus: str, rated: int) -> str:
    """The command that makes the same numbers."""
    options = {
        "--corpus": corpus if corpus != "demo" else None,
        "--vocoder": vocoder,
        "--speaker": speaker,
        "--limit": limit,
        "--rated": rated if rated != RATED else None,
    }
    return evaluate_command(str(run), options)


def _streamed_questions(asked: dict[HeldOutSet, list[Sample]]) -> list[NDArray[np.float32]]:
    """Questions of the last set, whose answers are the longest."""
    samples = list(asked.values())[-1][:STREAMED] if asked else []
    return [read_audio(sample["question.flac"]) for sample in samples]


def _spoken_sets(root: Path) -> list[Path]:
    """The corpus's sets of spoken sentences."""
    return [path.parent for path in sorted(root.glob(f"tts-*/{DATASET_NAME}"))]


def _reference_texts(asked: dict[HeldOutSet, list[Sample]]) -> set[str]:
    return {sample.meta["answer_text"] for samples in asked.values() for sample in samples}


def played(name: str, items: Sequence[SpokenItem], listener: Listener) -> list[dict[str, Any]]:
    """Some items of a set, with the waveforms of what was said and of the reference: what the report plays."""
    chosen = [items[index] for index in spread_over(len(items), PER_SET)]
    return [
        {
            "set": name,
            "question_text": item.question,
            "question_wav": encode_wav(item.question_audio),
            "answer_text": item.text,
            "answer_wav": _spoken(item.units, listener),
            "reference_text": item.reference,
            "reference_wav": _spoken(item.copy_units, listener),
            "judged_text": item.heard,
            "cascade_wav": _spoken(item.cascade_units, listener),
            "cascade_text": item.cascade_heard,
            "copy_text": item.copy_heard,
            "ok": item.text_right if item.units is None else item.speech_strict,
        }
        for item in chosen
    ]


def _spoken(units: Any, listener: Listener) -> bytes | None:
    return encode_wav(listener.speak([units])[0]) if units is not None and len(units) else None
