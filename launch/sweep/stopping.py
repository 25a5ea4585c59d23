"""Decides which trial is ended early: the median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2.2)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[int, float]]
"""Steps and values of a metric, in the order of the steps."""


@dataclass(frozen=True)
class MedianRule:
    """Ends a trial whose best value so far is worse than the median of what the others had reached by that step.

    Attributes:
        grace: steps before which none is ended.
        least: others that have to have come as far.
        maximize: whether more is better.
    """

    grace: int
    least: int = 3
    maximize: bool = False

    def ends(self, trial: str, curves: Mapping[str, Curve]) -> bool:
        """Whether a trial is to be ended.

        Args:
            trial: which.
            curves: of all trials, of those that ended too.
        """
        own = curves.get(trial, ())
        if not own or own[-1][0] < self.grace:
            return False
        step = own[-1][0]
        others = [curve for name, curve in curves.items() if name != trial and curve and curve[-1][0] >= step]
        if len(others) < self.least:
            return False
        median = statistics.median(self._mean(curve, step) for curve in others)
        best = self.best(own)
        return best < median if self.maximize else best > median

    def best(self, curve: Curve) -> float:
        """The best value of a curve."""
        values = [value for _, value in curve]
        return max(values) if self.maximize else min(values)

    @staticmethod
    def _mean(curve: Curve, step: int) -> float:
        return statistics.fmean(value for at, value in curve if at <= step)
