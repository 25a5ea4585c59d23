"""Runs the trials of a sweep as jobs, a few at a time, and ends those that fall behind.

Jobs, not trials of Ray Tune: each is a run like any other, with its own attempts, checkpoints and resumption, and goes
on when whoever started the sweep goes away. The same command finds them again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from echox.errors import EchoXError, LaunchError
from echox.files import read_record, write_atomically
from echox.run_records import metric_rows, read_progress
from launch.client.jobs import TERMINAL
from launch.client.status import locate
from launch.sweep.stopping import Curve, MedianRule
from launch.sweep.trials import Trial

if TYPE_CHECKING:
    from launch.client.jobs import Job

POLL_S = 2.0
DONE, ENDED, FAILED, WAITING, RUNNING = "done", "ended early", "failed", "waiting", "running"


class Queue(Protocol):
    """What a sweep needs of a cluster: `launch.client.jobs.Jobs` has it."""

    def submit(self, recipe: str, overrides: Sequence[str] = ()) -> str:
        """Submit a run; returns the job."""
        ...

    def list(self, run: str | None = None) -> list[Job]:
        """Jobs of the cluster."""
        ...

    def stop(self, job: str) -> str:
        """Let a job save and end."""
        ...

    def failure(self, job: str) -> str:
        """Why a job failed."""
        ...


@dataclass
class Outcome:
    """Where a trial stands.

    Attributes:
        trial: which.
        state: waiting, running, done, ended early or failed.
        job: its newest one.
        why: it failed.
        curve: of the sweep's metric.
    """

    trial: Trial
    state: str = WAITING
    job: str = ""
    why: str = ""
    curve: Curve = ()


@dataclass
class Sweep:
    """The trials of a recipe on a cluster.

    Attributes:
        recipe: YAML file or short name.
        trials: all of them.
        queue: the cluster.
        storage: folder of the runs, where it can be seen from here.
        record: file that remembers which trials were ended early.
        metric: that decides, as in `metrics.jsonl`.
        rule: that ends trials early; None lets all go to their end.
        parallel: jobs at a time.
        say: called with one line for people.
    """

    recipe: str
    trials: Sequence[Trial]
    queue: Queue
    storage: Path
    record: Path
    metric: str
    rule: MedianRule | None
    parallel: int
    say: Callable[[str], None]
    outcomes: dict[str, Outcome] = field(init=False)

    def __post_init__(self) -> None:
        ended = set(read_record(self.record.parent, self.record.name).get("ended", ()))
        self.outcomes = {trial.name: Outcome(trial, ENDED if trial.name in ended else WAITING) for trial in self.trials}

    def run(self, poll_s: float = POLL_S) -> list[Outcome]:
        """Train all trials to their ends; those that run already, from an earlier call, are waited for.

        Interrupted, it leaves its jobs alone.
        """
        while True:
            self._look()
            self._end_early()
            if not any(each.state in (WAITING, RUNNING) for each in self.outcomes.values()):
                return list(self.outcomes.values())
            self._submit()
            time.sleep(poll_s)

    def _look(self) -> None:
        """Learn from the cluster and the runs' folders how the trials stand."""
        jobs = self.queue.list()
        for name, outcome in self.outcomes.items():
            mine = [job for job in jobs if job["run"] == name]
            own = self.storage / name
            folder = own if own.is_dir() else locate(name, mine)
            if folder is not None:
                outcome.curve = curve(metric_rows(folder), self.metric)
            if outcome.state in (ENDED, FAILED, DONE):
                continue
            last = mine[-1] if mine else None
            if folder is not None and read_progress(folder).get("state") == "finished":
                self._becomes(outcome, DONE)
            elif last is not None and last["status"] not in TERMINAL:
                outcome.job = last["id"]
                self._becomes(outcome, RUNNING)
            elif last is not None and last["id"] == outcome.job and outcome.state == RUNNING:
                outcome.why = self.queue.failure(last["id"]) if last["status"] == "FAILED" else "it was stopped"
                self._becomes(outcome, DONE if last["status"] == "SUCCEEDED" else FAILED)

    def _end_early(self) -> None:
        if self.rule is None:
            return
        curves = {name: outcome.curve for name, outcome in self.outcomes.items()}
        for name, outcome in self.outcomes.items():
            if outcome.state == RUNNING and self.rule.ends(name, curves):
                # Noted first: whoever goes on after us must not begin it again.
                ended = [each for each, other in self.outcomes.items() if other.state == ENDED]
                write_atomically(self.record, json.dumps({"ended": [*ended, name]}) + "\n")
                self._becomes(outcome, ENDED)
                self.queue.stop(outcome.job)

    def _submit(self) -> None:
        running = sum(outcome.state == RUNNING for outcome in self.outcomes.values())
        waiting = [outcome for outcome in self.outcomes.values() if outcome.state == WAITING]
        for outcome in waiting[: max(0, self.parallel - running)]:
            try:
                outcome.job = self.queue.submit(self.recipe, outcome.trial.overrides)
            except LaunchError as error:
                outcome.why = error.what
                self._becomes(outcome, FAILED)
                continue
            self._becomes(outcome, RUNNING)

    def _becomes(self, outcome: Outcome, state: str) -> None:
        if outcome.state != state:
            outcome.state = state
            values = " ".join(f"{key}={value}" for key, value in outcome.trial.values.items())
            self.say(f"{outcome.trial.name}: {state}{f' ({outcome.why})' if state == FAILED else ''}  {values}")


def curve(rows: Iterable[dict[str, float]], metric: str) -> Curve:
    """Steps and values of a metric; of a step that was done twice, the later. What is no number is infinitely bad."""
    found = {int(row["step"]): row[metric] for row in rows if metric in row}
    return sorted((step, value if math.isfinite(value) else math.inf) for step, value in found.items())


def problem(outcomes: Sequence[Outcome]) -> EchoXError | None:
    """What is to be said where trials failed."""
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    if not failed:
        return None
    return LaunchError(
        f"{len(failed)} of {len(outcomes)} trials failed; the first, {failed[0].trial.name}: {failed[0].why}",
        fix="the same command tries them again",
    )
