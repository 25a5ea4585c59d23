"""Loads a run's curves, without steps that were lost, over steps, hours, tokens and seconds of audio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from echox.files import read_record
from echox.run_records import metric_rows
from echox.tracking.delivery import attempts_of
from echox.tracking.names import flatten

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

    from echox.tracking.listing import KnownRun

WANTED = ("loss/", "valid/loss/", "perf/", "grad_norm", "lr/")
AXES = {"step": "optimizer steps", "hours": "hours of training", "tokens": "million tokens", "audio": "hours of audio"}
_HOUR_MS = 3.6e6


@dataclass(frozen=True)
class Point:
    """One value: after `step` optimizer steps and `hours` of training, where the time is known."""

    step: int
    value: float
    hours: float | None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What is known of one run.

    Attributes:
        name: as the reader knows it, different for each run of a comparison.
        params: parameters, flat.
        points: metric to its points, in order of steps; steps that were done again count once.
        scores: results of evaluations.
    """

    name: str
    params: Mapping[str, str]
    points: Mapping[str, Sequence[Point]]
    scores: Mapping[str, float] = field(default_factory=dict)

    def axis(self, axis: str, metric: str) -> list[tuple[float, float]]:
        """The finite points of a metric over one of `AXES`; empty where the run does not know that axis."""
        positions = self._positions(axis)
        found = []
        for point in self.points.get(metric, ()):
            position = {"step": float(point.step), "hours": point.hours}.get(axis, positions.get(point.step))
            if position is not None and math.isfinite(point.value):
                found.append((position, point.value))
        return found

    def total(self, axis: str) -> float | None:
        """How far the run came on an axis."""
        found = self.axis(axis, "loss/total")
        return found[-1][0] if found else None

    def _positions(self, axis: str) -> dict[int, float]:
        """Step to what was seen until then: the rates that were reported, over the steps they stand for."""
        if axis not in ("tokens", "audio"):
            return {}
        rate = {"tokens": "perf/tokens_per_s_per_gpu", "audio": "perf/audio_s_per_s"}[axis]
        scale = int(self.params.get("scaling.workers", "1")) / 1e6 if axis == "tokens" else 1 / 3600
        step_s = {point.step: point.value / 1000 for point in self.points.get("perf/step_ms", ())}
        positions: dict[int, float] = {}
        seen, before = 0.0, 0
        for point in self.points.get(rate, ()):
            if point.step in step_s and math.isfinite(point.value):
                seen += point.value * step_s[point.step] * (point.step - before) * scale
                before = point.step
                positions[point.step] = seen
        return positions


def load(run: KnownRun, client: MlflowClient | None, name: str) -> Curves:
    """The curves of a run from its server, or, where that is away, from its folder (without times)."""
    if run.mlflow is None or client is None:
        return _of_folder(run, name)
    scores = {key.removeprefix("eval/"): v for key, v in run.mlflow.data.metrics.items() if key.startswith("eval/")}
    attempts = [attempt for _, attempt in sorted(attempts_of(client, run.mlflow).items())] or [run.mlflow]
    points: dict[str, list[Point]] = {}
    spent_ms = 0.0
    for attempt in attempts:
        begins_at = int(attempt.data.tags.get("from_step", 0))
        # The steps that were lost with the attempt before are not part of what was trained.
        points = {key: [point for point in known if point.step <= begins_at] for key, known in points.items()}
        histories = _histories(client, attempt)
        start, last = attempt.info.start_time, attempt.info.start_time
        for key, history in histories.items():
            known = points.setdefault(key, [])
            for item in history:
                known.append(Point(item.step, item.value, (spent_ms + item.timestamp - start) / _HOUR_MS))
                last = max(last, item.timestamp)
        spent_ms += last - start
    ordered = {key: sorted(known, key=lambda point: point.step) for key, known in points.items()}
    return Curves(name=name, params=dict(run.mlflow.data.params), points=ordered, scores=scores)


def _histories(client: MlflowClient, run: Run) -> dict[str, list[Metric]]:
    wanted = [key for key in run.data.metrics if key.startswith(WANTED)]
    return {key: client.get_metric_history(run.info.run_id, key) for key in wanted}


def _of_folder(run: KnownRun, name: str) -> Curves:
    folder = run.folder or Path("/nonexistent")
    points: dict[str, list[Point]] = {}
    for row in metric_rows(folder):
        for key, value in row.items():
            if key.startswith(WANTED):
                points.setdefault(key, []).append(Point(int(row["step"]), float(value), None))
    params = flatten(read_record(folder, "recipe.json"))
    return Curves(name=name, params=params, points=points)
