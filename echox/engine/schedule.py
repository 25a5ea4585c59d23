"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def lr_at(step: int, *, peak: float, warmup_steps: int, steps: int, final_ratio: float, hold_steps: int = 0) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, hold, cosine to `final_ratio * peak`.

    Warm-up step k of w uses (k + 1) / w of the peak, so no step is wasted on a rate of 0; the cosine is at the peak on
    its first step and at `final_ratio * peak` on step `steps - 1` and after.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    flat = warmup_steps + hold_steps
    progress = min(1.0, max(0, step - flat) / max(1, steps - 1 - flat))
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
