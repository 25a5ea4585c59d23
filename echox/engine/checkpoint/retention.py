"""Decides which checkpoints of a run are kept, and deletes the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echox.engine.checkpoint.manifest import discard, list_checkpoints, read_manifest, step_of
from echox.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rule: the newest ones, those at every so many steps, and the best one.

    Attributes:
        last: newest checkpoints that stay, at least 1.
        every: checkpoints at multiples of so many steps stay for good; 0 for none.
        best: metric whose lowest value keeps its checkpoint; None for none.
    """

    last: int
    every: int = 0
    best: str | None = None

    def doomed(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Steps whose checkpoints go, oldest first, given the metrics of every checkpoint by its step."""
        steps = sorted(metrics)
        kept = set(steps[-self.last :])
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        if self.best is not None:
            values = {step: metrics[step].get(self.best, math.nan) for step in steps}
            finite = [step for step in steps if math.isfinite(values[step])]
            if finite:
                kept.add(min(finite, key=lambda step: (values[step], step)))
        return [step for step in steps if step not in kept]

    def apply(self, run_folder: Path) -> list[Path]:
        """Delete what the rule does not keep, taking each name away first; returns what was deleted."""
        gone: list[Path] = []
        try:
            found = {step_of(path): path for path in list_checkpoints(run_folder)}
            metrics = {step: _metrics(path) for step, path in found.items()}
        except OSError:
            return []  # the storage does not answer now; which one is the best is not known
        for step in self.doomed(metrics):
            try:
                discard(found[step])
            except OSError:
                continue  # a delete that fails must not end training; the next save tries again
            gone.append(found[step])
        return gone


def _metrics(checkpoint: Path) -> Mapping[str, float]:
    try:
        metrics: Mapping[str, float] = read_manifest(checkpoint)["metrics"]
    except CheckpointError:
        return {}
    return metrics
