"""Detects steps that would harm the model before the optimizer moves, and applies the recipe's policy to them.

The verdict on a step is computed on the device from the losses of all ranks, and poisons the gradient instead of being
read: DeepSpeed looks at the norm of the gradient before every step anyway, and drops a step whose norm is not finite on
all ranks. So a bad step costs no host sync, and a good one nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from echox.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from echox.config.schema import HealthConfig


class GuardState(TypedDict):
    """What a checkpoint holds of a `LossGuard`: the losses of its window, how many were seen, and the bad steps."""

    losses: list[float]
    known: int
    bad_steps: int


class LossGuard:
    """Judges the loss of each step against those of the steps before it.

    A loss is bad when it is not finite, or, with `spike_sigma`, when it lies more than so many standard deviations
    above the mean of the last `spike_window` good steps; half a window must be known before anything counts as a spike.

    Args:
        config: the recipe's `health` section.
        device: where losses are.
    """

    def __init__(self, config: HealthConfig, device: torch.device) -> None:
        import torch

        self._config = config
        self._losses_W = torch.zeros(config.spike_window, dtype=torch.float64, device=device)
        self._known = 0
        self.bad_steps = 0
        self.in_a_row = 0
        self.rewinds = 0

    def nan_if_bad(self, total: Tensor) -> Tensor:
        """1 for a loss to learn from, NaN for a bad one; stays on the device.

        Multiplied into the loss, it makes the gradient of a bad step non-finite, so that DeepSpeed's own check of the
        gradient's norm drops the step on all ranks, without a host sync of ours.

        Args:
            total: weighted global loss of the step, a scalar, the same on all ranks.
        """
        import torch

        good = torch.isfinite(total)
        window = min(self._known, len(self._losses_W))
        if self._config.spike_sigma and 2 * window >= len(self._losses_W):
            losses = self._losses_W[:window]
            good = good & (total <= losses.mean() + self._config.spike_sigma * losses.std())
        return torch.where(good, 1.0, math.nan)

    def record(self, total: Tensor | None, *, skipped: bool) -> None:
        """Note how a step went; `skipped` is what DeepSpeed did."""
        if skipped:
            self.bad_steps += 1
            self.in_a_row += 1
            return
        self.in_a_row = 0
        if total is not None:
            self._losses_W[self._known % len(self._losses_W)] = total.detach()
            self._known += 1

    def check(self, step: int, losses: Mapping[str, float], where: str) -> None:
        """After a bad step: raise TrainingError when the recipe's policy is exhausted; a host sync.

        Args:
            step: number of the step, from 1.
            losses: of that step.
            where: the run's folder.
        """
        config = self._config
        limit = None
        if config.on_bad_step == "stop":
            limit = "health.on_bad_step=stop"
        elif config.on_bad_step == "rewind" and self.rewinds >= config.max_rewinds:
            limit = f"after health.max_rewinds={config.max_rewinds} rewinds"
        elif self.in_a_row > config.max_bad_steps:
            limit = f"more than health.max_bad_steps={config.max_bad_steps} bad steps in a row"
        if limit is not None:
            raise TrainingError(
                f"{self.reason(losses)} at step {step} ({limit})",
                where=where,
                fix="lower the learning rate or look at the batch of that step; the last checkpoint is untouched",
            )

    @staticmethod
    def reason(losses: Mapping[str, float]) -> str:
        """What was wrong with a bad step, as the beginning of a sentence."""
        wrong = sorted(name for name, value in losses.items() if not math.isfinite(value))
        if wrong:
            return f"{', '.join(wrong)} is not a finite number"
        if "loss/total" in losses:
            return f"the gradient is not finite or loss/total={losses['loss/total']:.4g} is a spike"
        return "the gradient is not finite"

    def state(self) -> GuardState:
        """For the checkpoint; JSON types. A host sync."""
        return {"losses": self._losses_W.tolist(), "known": self._known, "bad_steps": self.bad_steps}

    def load(self, state: GuardState) -> None:
        """Continue from what `state` gave; a window of another length begins again."""
        self.bad_steps, self.in_a_row = int(state["bad_steps"]), 0
        losses: Sequence[float] = state["losses"]
        if len(losses) == len(self._losses_W):
            import torch

            self._losses_W.copy_(torch.tensor(losses, dtype=torch.float64))
            self._known = int(state["known"])
