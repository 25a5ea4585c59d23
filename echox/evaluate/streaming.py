"""Measures how soon a streamed answer can be heard, and how much faster than speech it is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.speak.events import Audio, Failed, TextToken

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import Vocoder


@dataclass(frozen=True, kw_only=True)
class StreamedAnswer:
    """What one streamed answer took, from the end of its question on, in an otherwise idle process.

    Attributes:
        text_s, audio_s: until the first token, and the first samples; None where there were none.
        audio_cpu_s: processor seconds until then, of all threads.
        wall_s, cpu_s: the whole answer.
        spoken_s: the audio that came out.
        gaps: how often a listener who hears it as it comes would have had to wait.
        failed: segments that failed.
    """

    text_s: float | None
    audio_s: float | None
    audio_cpu_s: float | None
    wall_s: float
    cpu_s: float
    spoken_s: float
    gaps: int
    failed: int


def time_answer(model: SpeechToSpeech, vocoder: Vocoder, question: NDArray[np.float32]) -> StreamedAnswer:
    """Stream the answer to one question and note when what came."""
    first: dict[type, tuple[float, float]] = {}
    spoken, gaps, failed, runs_out = 0.0, 0, 0, 0.0
    began, cpu_began = time.perf_counter(), time.process_time()
    for event in model.stream(question, vocoder=vocoder):
        now = time.perf_counter() - began
        first.setdefault(type(event), (now, time.process_time() - cpu_began))
        failed += isinstance(event, Failed)
        if isinstance(event, Audio):
            gaps += bool(spoken) and now > runs_out
            lasts = len(event.samples) / event.rate
            spoken, runs_out = spoken + lasts, max(now, runs_out) + lasts
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    nothing = (None, None)
    audio_s, audio_cpu_s = first.get(Audio, nothing)
    return StreamedAnswer(
        text_s=first.get(TextToken, nothing)[0],
        audio_s=audio_s,
        audio_cpu_s=audio_cpu_s,
        wall_s=wall,
        cpu_s=cpu,
        spoken_s=spoken,
        gaps=gaps,
        failed=failed,
    )


def score_streaming(
    model: SpeechToSpeech, vocoder: Vocoder, questions: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    """Medians over questions, after one that is not counted.

    Returns:
        `n` answers that are heard; `first_text_ms`, `first_audio_ms`, and `first_audio_p90_ms` (the 90th percentile);
        `first_audio_cpu_ms`; `real_time_factor` and `real_time_factor_cpu`, seconds of work a second of speech of all
        answers together; `gaps` an answer; `failed` segments. Empty where no answer is heard.
    """
    if questions:
        time_answer(model, vocoder, questions[0])
    heard = [each for each in (time_answer(model, vocoder, question) for question in questions) if each.spoken_s]
    if not heard:
        return {}
    rows: dict[str, Any] = {name: [asdict(each)[name] for each in heard] for name in asdict(heard[0])}
    spoken = sum(rows["spoken_s"])
    return {
        "n": len(heard),
        "first_text_ms": 1000 * float(np.median(rows["text_s"])),
        "first_audio_ms": 1000 * float(np.median(rows["audio_s"])),
        "first_audio_p90_ms": 1000 * float(np.percentile(rows["audio_s"], 90)),
        "first_audio_cpu_ms": 1000 * float(np.median(rows["audio_cpu_s"])),
        "real_time_factor": sum(rows["wall_s"]) / spoken,
        "real_time_factor_cpu": sum(rows["cpu_s"]) / spoken,
        "gaps": sum(rows["gaps"]) / len(heard),
        "failed": sum(rows["failed"]),
    }
