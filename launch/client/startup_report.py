"""Reports what the start of a run's last attempt spent its time on, from the run's events."""

from __future__ import annotations

from collections.abc import Iterable

from launch.events import JobEvent

BEGIN, DRIVER, FAILURE, WORKER, STEP = "job_begin", "job_start", "job_failure", "start", "step"
"""Events of the job, of its driver with the MLflow run open, of workers that were lost, of rank 0 before its first step
and after it."""


def start_up(events: Iterable[JobEvent], submitted: float | None = None) -> dict[str, float]:
    """Seconds from submission, or from the loss of the workers before, to the first step, by what they went into.

    Args:
        events: of the run, by time.
        submitted: Unix time at which the cluster took the job.

    Returns:
        `ray` (until the job runs, where `submitted` is known), `driver` (imports, MLflow run), `workers` (Ray Train's
        controller, processes of the workers), then rank 0's own: `imports` (and the process group), `run` (attempt and
        checkpoint), `models`, `data`, `engine` (DeepSpeed), `step` (resuming, and the first one). Workers that replace
        lost ones have no `ray` and `driver`. Empty before the first step.
    """
    found: dict[str, float] = {}
    begun = ready = started = 0.0
    for event in events:
        name, when = event["event"], event["time"]
        if name == BEGIN:
            begun, ready = when, 0.0
        elif name == DRIVER:
            begun, ready = begun or when, when
        elif name == FAILURE:
            begun, ready = 0.0, when
        elif name == WORKER and event["rank"] == 0 and ready and isinstance(event.get("start_s"), dict):
            found = {} if submitted is None or not begun else {"ray": begun - submitted}
            if begun:
                found["driver"] = ready - begun
            found["workers"] = when - sum(event["start_s"].values()) - ready
            found |= event["start_s"]
            started = when
        elif name == STEP and event["rank"] == 0 and started and "step" not in found:
            found["step"] = when - started
    return found if "step" in found else {}


def describe(seconds: dict[str, float]) -> str:
    """`71 s: ray 5, driver 15, ...`."""
    return f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
