"""Adds the scores of benchmarks to the run in MLflow, under `eval/<benchmark>/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import read_manifest
from echox.errors import DataError
from echox.evaluate.benchmarks.table import COLUMNS

_NAMES = {"s2t": "s2t_acc", "s2s": "s2s_acc", "cascade": "cascade_acc"}
"""Where the demo's held-out sets have another name for the same score."""


def track(run: Path, results: Mapping[str, Any]) -> None:
    """Record the greedy scores at the step of the checkpoint.

    Raises:
        DataError: the run has no tracked run, one that its folder may not name, or the server is away.
    """
    from echox.tracking.run import record, uri_of
    from echox.tracking.servers import refusal

    uri = uri_of(run)
    reason = "it was not tracked" if uri is None else refusal(uri, run)
    step = int(read_manifest(find_weights(run).parent).get("step", 0))
    if reason or not record(run, metrics=metrics(results), artifacts={}, step=step):
        why = reason or "the tracking server does not answer"
        raise DataError(f"the scores cannot be added to the run: {why}", where=str(run), fix="leave out --track")


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name, with shares from 0 to 1."""
    return {
        f"eval/{name}/{_NAMES.get(column.key, column.key)}": float(found["runs"][0][column.key])
        for name, found in results["benchmarks"].items()
        for column in COLUMNS
        if found["runs"][0][column.key] is not None
    }
