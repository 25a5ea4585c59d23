"""Shows the metrics of a run as gauges on Ray's own Prometheus endpoints, beside the tracker they go to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echox.engine.interfaces import Tracker

log = logging.getLogger("launch.gauges")

TAGS = ("run", "stage")


class GaugeName(NamedTuple):
    """A gauge as Ray is told of it; Ray puts `ray_` before its name."""

    name: str
    description: str


STEP = GaugeName("echox_step", "optimizer steps done")
ATTEMPT = GaugeName("echox_attempt", "number of the attempt at the run")
OF_METRICS = {
    "loss/total": GaugeName("echox_loss", "weighted sum of the losses, each a token mean of the step"),
    "valid/loss/total": GaugeName("echox_valid_loss", "the same over the validation sets"),
    "grad_norm": GaugeName("echox_grad_norm", "global norm of the gradient"),
    "health/bad_steps": GaugeName("echox_bad_steps", "steps so far whose loss or gradient was not finite or spiked"),
    "perf/step_ms": GaugeName("echox_step_ms", "milliseconds a step"),
    "perf/samples_per_s": GaugeName("echox_samples_per_s", "samples a second, all ranks"),
    "perf/tokens_per_s_per_gpu": GaugeName("echox_tokens_per_s_per_gpu", "tokens a second and rank"),
    "perf/audio_s_per_s": GaugeName("echox_audio_s_per_s", "seconds of audio a second, all ranks"),
    "perf/mfu": GaugeName("echox_mfu", "useful FLOP/s over those of the GPU's data sheet, 0 to 1"),
    "perf/padding_share": GaugeName("echox_padding_share", "share of the computed positions that are padding, 0 to 1"),
    "perf/teacher_share": GaugeName("echox_teacher_share", "share of the time in the teacher's decode, 0 to 1"),
    "perf/data_wait_share": GaugeName("echox_data_wait_share", "share of the time that rank 0 waited for data, 0 to 1"),
    "perf/step_skew_ms": GaugeName("echox_step_skew_ms", "step time, slowest rank less fastest, milliseconds"),
    "perf/data_wait_skew_ms": GaugeName("echox_data_wait_skew_ms", "the same of the wait for data"),
    "perf/cpu_skew_ms": GaugeName("echox_cpu_skew_ms", "the same of processor time; training on CPUs only"),
    "perf/slowest_rank": GaugeName("echox_slowest_rank", "rank that the others wait for"),
    "perf/save_s": GaugeName("echox_save_s", "seconds from the start of the last save to its checkpoint"),
    "perf/save_blocked_ms": GaugeName("echox_save_blocked_ms", "milliseconds that training stood still for it"),
    "perf/peak_gib": GaugeName("echox_peak_gib", "peak memory of rank 0 so far, GiB"),
    "data/quarantined": GaugeName("echox_quarantined", "samples so far that were left out because they cannot be used"),
}
"""Metric of the engine to its gauge. What a run does not report has no value."""


class Gauges:
    """A tracker that hands everything on to another one, and shows what it sees as gauges.

    Whatever fails in Ray's metrics costs the gauges, with one warning, and nothing else.

    Args:
        tracker: what is recorded.
        run, stage: tags of every value.
    """

    def __init__(self, tracker: Tracker, *, run: str, stage: str) -> None:
        self._tracker = tracker
        self._tags = {"run": run, "stage": stage}
        self._made: dict[str, Any] = {}
        self._works = True

    @property
    def in_one_file(self) -> bool:
        """As the tracker says."""
        return self._tracker.in_one_file

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics, and show those that have a gauge."""
        self._tracker.log_metrics(metrics, step)
        self._show({STEP: step, **{OF_METRICS[name]: value for name, value in metrics.items() if name in OF_METRICS}})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the parameters."""
        self._tracker.log_params(params)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach a file."""
        self._tracker.artifact(path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._tracker.set_tags(tags)

    def begin_attempt(self, attempt: int, step: int, tags: Mapping[str, str]) -> None:
        """An attempt begins; its number and its first step are shown."""
        self._tracker.begin_attempt(attempt, step, tags)
        self._show({ATTEMPT: attempt, STEP: step})

    def end_attempt(self, status: str, tags: Mapping[str, str]) -> None:
        """The attempt ends."""
        self._tracker.end_attempt(status, tags)

    def finish(self, status: str) -> None:
        """End the run."""
        self._tracker.finish(status)

    def _show(self, values: Mapping[GaugeName, float]) -> None:
        if not self._works:
            return
        try:
            for (name, description), value in values.items():
                if name not in self._made:
                    self._made[name] = _gauge(name, description)
                self._made[name].set(float(value), tags=self._tags)
        except Exception as error:
            self._works = False
            log.warning("the gauges of %s end here, training goes on: %s", self._tags["run"], error)


def _gauge(name: str, description: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=description, tag_keys=TAGS)
