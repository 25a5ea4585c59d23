"""Reports events, metrics and progress of a run while it trains, to its folder and to the tracker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echox.engine.train_state import TrainState

if TYPE_CHECKING:
    from echox.config.run_recipe import RunRecipe
    from echox.engine.interfaces import Tracker
    from echox.engine.monitor.event_log import EventLog
    from echox.engine.monitor.run_dir import RunDir

# Metrics in the line for people; the JSON line has them all.
_SHOWN = ("loss/", "valid/loss/", "lr/", "grad_norm", "perf/step_ms", "perf/samples_per_s", "check/", "health/")


@dataclass
class Reporter:
    """Reports for one rank: rank 0 alone writes the files and the tracker, every rank its log.

    Attributes:
        recipe: the run.
        folder: where it lies.
        log: this rank's events.
        tracker: of rank 0, or one that records nothing.
        is_main: whether this is rank 0.
        attempt: number of this attempt.
        state: where the run stands; its step is that of every event.
        metrics: the last value of each metric.
    """

    recipe: RunRecipe
    folder: RunDir
    log: EventLog
    tracker: Tracker
    is_main: bool
    attempt: int
    state: TrainState = field(default_factory=TrainState)
    metrics: dict[str, float] = field(default_factory=dict)

    def event(self, name: str, **values: Any) -> None:
        """One event at the present step."""
        self.log(name, step=self.state.step, **values)

    def record(self, event: str, metrics: Mapping[str, float]) -> None:
        """Metrics of the present step, as an event too."""
        self.metrics.update(metrics)
        shown = {name: value for name, value in metrics.items() if name.startswith(_SHOWN)}
        self.log(event, step=self.state.step, aside={k: v for k, v in metrics.items() if k not in shown}, **shown)
        if self.is_main:
            with self._unless_full():
                self.folder.append_metrics(self.state.step, metrics)
            self.tracker.log_metrics(metrics, self.state.step)

    def tag(self, **tags: Any) -> None:
        """Tags of the tracked run."""
        if self.is_main:
            self.tracker.set_tags({name: str(value) for name, value in tags.items()})

    def progress(self, state: str) -> None:
        """Replace the progress file; see `Progress` for the states."""
        if not self.is_main:
            return
        left = self.recipe.optim.steps - self.state.step
        step_ms = self.metrics.get("perf/step_ms")
        with self._unless_full():
            self.folder.write_progress(
                stage=self.recipe.stage,
                step=self.state.step,
                steps=self.recipe.optim.steps,
                state=state,
                attempt=self.attempt,
                loss=self.metrics.get("loss/total"),
                samples_per_s=self.metrics.get("perf/samples_per_s"),
                eta_s=None if step_ms is None else left * step_ms / 1000,
            )

    @contextlib.contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.log.lose(error)
