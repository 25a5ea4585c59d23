"""Holds where a run stands: the optimizer step, the newest checkpoint, and why it was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class TrainState:
    """What changes while a run trains; the trainer makes it, the loop changes it, everything else reads it.

    Attributes:
        step: optimizer steps done in all attempts.
        saved_step: step of the last checkpoint that was begun or loaded; -1 before one, and after one that failed.
        checkpoint: the newest checkpoint known to be whole.
        stopped: why the run was stopped before its last step; empty when it was not.
        bad_step: whether the last step was dropped, since its loss or gradient was not finite or spiked.
    """

    step: int = 0
    saved_step: int = -1
    checkpoint: Path | None = None
    stopped: str = ""
    bad_step: bool = False
