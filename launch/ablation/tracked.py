"""Logs what an ablation found to MLflow: each run's scores to that run, the table to the run that they are children of.

Unlike `echox.tracking.run.record`, an evaluation that is repeated replaces the numbers of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from echox.evaluate.columns import METRICS
from echox.tracking.lifecycle import make_client
from echox.tracking.names import METRICS_PER_BATCH, batches, metric_name
from echox.tracking.state import read_state
from launch.ablation.scoring import Scores
from launch.ablation.table import Row

TIMEOUT_S = 10
_NUMBERS = (
    *("n", "s2t_strict_acc", "s2s_strict_acc", "cascade_acc", "retention_paired", "wer", "difference"),
    *("interval_95", "over_seeds", "difference_95"),
)


def log(
    run_folder: Path, which: Literal["run_id", "parent_id"], metrics: Mapping[str, float], files: Sequence[Path]
) -> str:
    """Add metrics and files to the run of a folder, or to its parent; says why where that failed, else nothing.

    Args:
        run_folder: of a run that was tracked.
        which: `run_id` for the run, `parent_id` for its parent.
        metrics: values by name.
        files: artifacts.
    """
    state = read_state(run_folder)
    run_id = state.get(which)
    if not run_id:
        return f"{run_folder.name} has no MLflow run, so its scores are in its folder alone"
    try:
        from mlflow.entities import Metric

        client, now = make_client(state["uri"], timeout_s=TIMEOUT_S), int(time.time() * 1000)
        points = [Metric(metric_name(name), float(value), now, 0) for name, value in metrics.items()]
        for part in batches(points, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=part)
        for path in files:
            client.log_artifact(run_id, str(path))
    except Exception as error:
        return f"the scores of {run_folder.name} could not be added to MLflow at {state['uri']}: {error}"
    return ""


def score_metrics(scores: Scores) -> dict[str, float]:
    """Metrics of one run, named as those of the demo's evaluation: `eval/<set>/<score>`."""
    return {
        f"eval/{name}/{key}": float(row[key])
        for name, row in scores.items()
        for key in METRICS
        if isinstance(row.get(key), int | float)
    }


def table_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the table: `<set>/<arm>/<number>`, of intervals both ends."""
    found: dict[str, float] = {}
    for row in rows:
        for key in _NUMBERS:
            value, name = getattr(row, key), f"{row.set}/{row.arm}/{key}"
            if isinstance(value, list):
                found |= {f"{name}_low": value[0], f"{name}_high": value[1]}
            elif value is not None:
                found[name] = float(value)
    return found
