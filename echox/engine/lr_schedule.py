"""Computes the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echox.config.schema import Recipe

ALIGNED = {"s2t": "adapters", "echo": "denoising"}
"""The parameter group that learns in a stage's alignment phase."""
ALIGN_HELD = 0.7
"""Share of the alignment phase at its peak rate; CTC learns words late and wants the rate for most of it."""


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


def rate_at(recipe: Recipe, group: str, step: int) -> float:
    """Learning rate of a parameter group at optimizer step `step` (from 0).

    Where the recipe gives the alignment phase a rate, that phase is a cycle of its own, in which nothing but what it
    aligns learns, and the joint phase after it is another.
    """
    optim = recipe.optim
    align = recipe.align_steps if optim.lr.align is not None else 0
    if step < align:
        peak = optim.lr.align if group == ALIGNED.get(recipe.stage) and optim.lr.align else 0.0
        warmup, held = optim.warmup_steps, int(ALIGN_HELD * align)
        return lr_at(step, peak=peak, warmup_steps=warmup, hold_steps=held - warmup, steps=align, final_ratio=0.0)
    return lr_at(
        step - align,
        peak=getattr(optim.lr, group),
        warmup_steps=optim.warmup_steps,
        hold_steps=optim.hold_steps,
        steps=optim.steps - align,
        final_ratio=optim.final_lr_ratio,
    )
