"""Trains the demo's vocoder, units to waveforms, on the answer voice of the corpus."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from echox.stream.format.catalogue import DATASET_NAME
from echox.units.identity import RECORD, read_unit_set, write_unit_set
from shards.demo.plan import Scale

VOCODER_STEPS = 300


def ensure_vocoder(
    cache: Path,
    steps: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    scale: Scale = "demo",
) -> bool:
    """Train the vocoder unless there is one that is newer than the corpus and of its units.

    Args:
        cache: root of the cache, with the corpus and its units.
        steps: optimizer steps; None takes `VOCODER_STEPS`.
        progress: called with phase, steps done and steps in all.
        scale: of the corpus.

    Returns:
        Whether it was trained.
    """
    corpus = cache / "data" / scale
    spoken, vocoder = corpus / "tts-train", corpus / "vocoder"
    made = max((path.stat().st_mtime for path in vocoder.rglob("*") if path.is_file()), default=0.0)
    units, its_units = read_unit_set(spoken), read_unit_set(vocoder)
    other = units is not None and its_units is not None and bool(units.conflicts(its_units))
    if made > (spoken / DATASET_NAME).stat().st_mtime and not other:
        if its_units is None and units is not None:
            # Trained on these shards before such records were. An evaluation is repeated for a vocoder of a new date.
            write_unit_set(vocoder, units)
            os.utime(vocoder / RECORD, (made, made))
        return False
    from echox.speak.unit_mel import train_vocoder

    train_vocoder(spoken, vocoder, steps=steps or VOCODER_STEPS, progress=progress)
    return True
