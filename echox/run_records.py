"""Reads what a run reports in its folder, which may be someone else's: progress and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

from echox.errors import DataError
from echox.files import is_within, parse_json, read_lines, read_record


class Progress(TypedDict, total=False):
    """`progress.json`: where a run stands right now; empty before its first attempt.

    Attributes:
        stage: of the recipe.
        step, steps: optimizer steps done, and those of the whole run.
        state: starting, training, refreshing, validating, saving, stopping, stopped, finished or failed.
        attempt: number of the attempt.
        loss, samples_per_s: of the last report; None before it.
        eta_s: seconds to the last step, where a rate is known.
        time: Unix time of the record.
    """

    stage: str
    step: int
    steps: int
    state: str
    attempt: int
    loss: float | None
    samples_per_s: float | None
    eta_s: float | None
    time: float


LARGEST_METRICS = 256 << 20
"""Bytes of the metrics of a run."""
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("stage", "state"), str),
    **dict.fromkeys(("step", "steps", "attempt"), int),
    **dict.fromkeys(("loss", "samples_per_s", "eta_s"), int | float | None),
    "time": int | float,
}


def read_progress(run_folder: Path) -> Progress:
    """The progress of a run; empty if there is none. The folder may be someone else's: other fields are left out."""
    found = read_record(run_folder, "progress.json")
    kept = {name: value for name, value in found.items() if isinstance(value, _FIELDS.get(name, ())) and _sane(value)}
    return cast(Progress, kept)


def metric_rows(run_folder: Path) -> Iterator[dict[str, float]]:
    """The rows of a run's `metrics.jsonl` in order; none if there is none. What is no row of numbers is left out.

    Raises:
        DataError: the file is no log of metrics.
    """
    file = run_folder / "metrics.jsonl"
    if not file.exists() or not is_within(run_folder, file):
        return
    try:
        if file.stat().st_size > LARGEST_METRICS:
            raise ValueError(f"it has more than {LARGEST_METRICS >> 20} MiB")
        for line in read_lines(file):
            try:
                row = parse_json(line)
            except ValueError:
                continue  # cut short by a crash
            if isinstance(row, dict) and isinstance(row.get("step"), int) and _sane(row["step"]):
                yield {name: value for name, value in row.items() if isinstance(value, int | float) and _sane(value)}
    except (OSError, ValueError) as error:
        raise DataError(
            f"the metrics of the run cannot be read: {error}", where=str(file), fix="keep a copy of its last lines only"
        ) from error


def _sane(value: object) -> bool:
    """Whether a number is one that arithmetic with floats takes."""
    return not isinstance(value, int) or abs(value) < 1 << 62
