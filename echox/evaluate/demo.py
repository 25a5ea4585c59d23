"""Evaluates a run of the demo: scores on its held-out sets, the vocoder's ceiling, and samples to listen to."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echox.config.paths import cache_dir, resolve_data, resolve_model
from echox.evaluate.spoken import (
    SetScore,
    SpokenItem,
    resynthesis_wer,
    score_questions,
    score_transcription,
    take,
)

JUDGE = "Xenova/whisper-small"
"""Not the model in the loop: that one hears with Whisper-base."""
QUESTION_SETS = ("sqa-heldout-phrasing", "sqa-heldout-knowledge")
ASR_SET = "asr-heldout-real"
RESYNTHESIS_SET = "tts-heldout"
RESYNTHESIS_ITEMS = 40

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """All scores of one run.

    Attributes:
        sets: held-out set to its scores.
        resynthesis_wer, original_wer: true units spoken again, and the original audio, under the same judge.
    """

    sets: dict[str, SetScore]
    resynthesis_wer: float
    original_wer: float

    def to_json(self) -> dict[str, Any]:
        """Scores without audio."""
        return {
            "sets": {name: score.row() for name, score in self.sets.items()},
            "resynthesis_wer": self.resynthesis_wer,
            "original_wer": self.original_wer,
        }

    def samples(self, per_set: int = 6) -> list[dict[str, Any]]:
        """Questions with players' WAV bytes, some of every set, wrong answers included."""
        chosen = [(name, item) for name, score in self.sets.items() for item in _spread(score.items, per_set)]
        return [_sample(name, item) for name, item in chosen]


def evaluate_demo(
    run: Path, *, vocoder: Path | None = None, limit: int | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score an echo run of the demo on its held-out sets.

    Args:
        run: run or checkpoint folder of the echo stage.
        vocoder: vocoder folder; default: the demo's.
        limit: most items of each set.
        progress: called with phase, items done and items in all.

    Raises:
        DataError: the vocoder is of other units than the run or the held-out set.
    """
    from echox.evaluate.asr import Judge
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, load_vocoder
    from echox.units.identity import UnitPart, read_unit_set

    folder = vocoder or cache_dir() / "data" / "demo" / "vocoder"
    speaker = load_vocoder(folder)
    judge = Judge.load(resolve_model(JUDGE))
    model = SpeechToSpeech.load(run)
    spoken = UnitPart(f"demo/{RESYNTHESIS_SET}", read_unit_set(resolve_data(f"demo/{RESYNTHESIS_SET}")))
    check_vocoder(folder, [model.units, spoken])
    ceilings = json.loads((cache_dir() / "data" / "demo" / "corpus.json").read_text()).get("text_llm_acc", {})
    sets: dict[str, SetScore] = {}

    def watch(name: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(name, done, total)) if progress else None

    for name in QUESTION_SETS:
        samples = take(resolve_data(f"demo/{name}"), limit)
        sets[name] = score_questions(
            model, samples, speaker, judge, text_llm_acc=ceilings.get(name), progress=watch(name)
        )
    if (cache_dir() / "data" / "demo" / ASR_SET).is_dir():
        samples = take(resolve_data(f"demo/{ASR_SET}"), limit)
        sets[ASR_SET] = score_transcription(model, samples, progress=watch(ASR_SET))
    samples = take(resolve_data(f"demo/{RESYNTHESIS_SET}"), min(limit or RESYNTHESIS_ITEMS, RESYNTHESIS_ITEMS))
    again, original = resynthesis_wer(samples, speaker, judge, progress=watch(RESYNTHESIS_SET))
    return Evaluation(sets, again, original)


def _spread(items: list[SpokenItem], count: int) -> list[SpokenItem]:
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in dict.fromkeys(indices.tolist())]


def _sample(name: str, item: SpokenItem) -> dict[str, Any]:
    spoken = item.answer_audio is not None
    return {
        "set": name,
        "question_text": item.question,
        "question_wav": _wav(item.question_audio),
        "answer_text": item.text,
        "answer_wav": _wav(item.answer_audio) if item.answer_audio is not None else None,
        "reference_text": item.reference,
        "reference_wav": None,
        "judged_text": item.heard,
        "ok": item.speech_right if spoken else item.text_right,
    }


def _wav(samples: Any) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
