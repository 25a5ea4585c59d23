"""Compares runs: parameters that differ, grouped by section, and the outcome of each metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echox.tracking.curves import AXES, Curves

_TOP = "run"
_SMOOTH = 5


@dataclass(frozen=True)
class Outcome:
    """One line of the table of metrics: a number a run, None where a run has none."""

    name: str
    kind: str
    values: tuple[float | None, ...]
    lower_is_better: bool | None = None

    def best(self) -> int | None:
        """Which run has the best value, where that can be said and they are not all the same."""
        known = [value for value in self.values if value is not None]
        if self.lower_is_better is None or len(known) < 2 or len(set(known)) == 1:
            return None
        wanted = min(known) if self.lower_is_better else max(known)
        return self.values.index(wanted)


def differences(runs: Sequence[Curves]) -> dict[str, dict[str, list[str | None]]]:
    """Section to dotted key to the value in each run, None where it is absent; only what is not the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.params))
    found: dict[str, dict[str, list[str | None]]] = {}
    for key in keys:
        values = [run.params.get(key) for run in runs]
        if len(set(values)) > 1:
            found.setdefault(key.split(".")[0] if "." in key else _TOP, {})[key] = values
    return {section: dict(sorted(found[section].items())) for section in sorted(found, key=lambda s: (s != _TOP, s))}


def outcomes(runs: Sequence[Curves]) -> list[Outcome]:
    """Extent, losses, scores and speed of each run.

    A final loss is the mean of the last five values, for a single batch says little; the best is the least single one.
    Rates are medians.
    """
    lines = [Outcome(label, "in all", tuple(run.total(axis) for run in runs)) for axis, label in AXES.items()]
    for name in _names(runs, "loss/", "valid/loss/"):
        tail = 1 if name.startswith("valid/") else _SMOOTH
        lines.append(Outcome(name, "final", tuple(_final(run, name, tail) for run in runs), lower_is_better=True))
        lines.append(Outcome(name, "best", tuple(_over(run, name, min) for run in runs), lower_is_better=True))
    scores = list(dict.fromkeys(name for run in runs for name in run.scores))
    for name in scores:
        lower = None if name.endswith("/n") else name.endswith("wer")
        lines.append(Outcome(f"eval/{name}", "score", tuple(run.scores.get(name) for run in runs), lower))
    for name in _names(runs, "perf/"):
        peak = name.endswith("peak_gib") or name.endswith("invalidations")
        values = tuple(_over(run, name, max if peak else statistics.median) for run in runs)
        lines.append(Outcome(name, "peak" if peak else "median", values, _better_low(name)))
    return [line for line in lines if any(value is not None for value in line.values)]


def common(runs: Sequence[Curves], prefix: str) -> list[str]:
    """Metrics that every run has, the total first."""
    shared = set.intersection(*({name for name in run.points if name.startswith(prefix)} for run in runs))
    return sorted(shared, key=lambda name: (not name.endswith("/total"), name))


def as_json(runs: Sequence[Curves]) -> dict[str, Any]:
    """The comparison for scripts."""
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for line in outcomes(runs):
        metrics.setdefault(line.name, {})[line.kind] = list(line.values)
    return {"runs": [run.name for run in runs], "differences": differences(runs), "metrics": metrics}


def _names(runs: Sequence[Curves], *prefixes: str) -> list[str]:
    known = {name for run in runs for name in run.points if name.startswith(prefixes)}
    order = {prefix: index for index, prefix in enumerate(prefixes)}
    return sorted(
        known, key=lambda name: (order[next(p for p in prefixes if name.startswith(p))], "/total" not in name, name)
    )


def _final(run: Curves, name: str, tail: int) -> float | None:
    values = [point.value for point in run.points.get(name, ())][-tail:]
    return statistics.fmean(values) if values else None


def _over(run: Curves, name: str, reduce: Any) -> float | None:
    values = [point.value for point in run.points.get(name, ()) if math.isfinite(point.value)]
    return float(reduce(values)) if values else None


def _better_low(name: str) -> bool | None:
    """Whether less is better; unsaid where it depends on the hardware and the batch."""
    if name in (
        "perf/mfu",
        "perf/tflops_per_s_per_gpu",
        "perf/tokens_per_s_per_gpu",
        "perf/audio_s_per_s",
        "perf/samples_per_s",
    ):
        return False
    return True if name in ("perf/data_wait_share", "perf/padding_share", "perf/teacher_share") else None
