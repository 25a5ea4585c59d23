"""Trains the demo's vocoder, units to waveforms, on the answer voice of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from echox.stream.format.catalogue import DATASET_NAME
from shards.builder.records import CORPUS

VOCODER_STEPS = 300


def ensure_vocoder(
    cache: Path, steps: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> bool:
    """Train the vocoder unless there is one newer than the corpus.

    Args:
        cache: root of the cache, with the corpus and its units.
        steps: optimizer steps; None takes `VOCODER_STEPS`.
        progress: called with phase, steps done and steps in all.

    Returns:
        Whether it was trained.
    """
    corpus = cache / CORPUS
    spoken, vocoder = corpus / "tts-train", corpus / "vocoder"
    made = max((path.stat().st_mtime for path in vocoder.rglob("*") if path.is_file()), default=0.0)
    if made > (spoken / DATASET_NAME).stat().st_mtime:
        return False
    from echox.speak.unit_mel import train_vocoder

    train_vocoder(spoken, vocoder, steps=steps or VOCODER_STEPS, progress=progress)
    return True
