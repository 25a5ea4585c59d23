"""Makes Ray Train's decisions by the recipe's rules: which failures are tried again, and how many workers may run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from echox.engine.stop import request_stop
from echox.run_records import Progress
from launch.events import FAILED, MORE_ROOM, JobLog, read_events, read_progress
from launch.job.failure_cause import Cause, find_cause
from launch.job.queue import Queue

NOT_NEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)
"""Each would start a process of its own for every group of workers: one removes the placement groups of a controller
that died, which end with our driver, the other serves Ray Datasets."""


class Failures(FailurePolicy):
    """Tries again within two budgets, of failures at the start and after it; never after an error of the user.

    That there is no room yet is no failure: the run is queued, says what it waits for, and spends nothing.

    Args:
        config: Ray's own settings; only its budget for drained nodes is used, which has no end.
        max_failures: failures after the first step that are survived.
        max_start_failures: failures before it that are survived.
        run_folder: where ranks leave events, and this policy its decisions.
        wanted: resources of the smallest group of workers.
        queue_timeout_s: seconds in a row that the run waits for them; None is as long as it takes.
    """

    def __init__(
        self,
        config: FailureConfig,
        *,
        max_failures: int,
        max_start_failures: int,
        run_folder: Path,
        wanted: Mapping[str, float],
        queue_timeout_s: float | None,
    ) -> None:
        super().__init__(config)
        self.left = {"worker": max_failures, "start": max_start_failures}
        self.run_folder = run_folder
        self.wanted = wanted
        self.queue_timeout_s = queue_timeout_s
        self._queued_since = time.monotonic()
        self._last_attempt = read_progress(run_folder).get("attempt", 0)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide, and say why."""
        failure = getattr(training_failed_error, "controller_failure", None)
        if isinstance(failure, WorkerGroupStartupTimeoutError) and self._may_wait():
            return FailureDecision.RETRY
        self._queued_since = time.monotonic()
        progress = read_progress(self.run_folder)
        attempt = progress.get("attempt", 0)
        events = [e for e in read_events(self.run_folder) if e["event"] == FAILED and e.get("attempt") == attempt]
        cause = find_cause(training_failed_error, self.run_folder, events)
        budget = self._budget(cause, training_failed_error, progress)
        self._last_attempt = attempt
        if budget in self.left:
            again = self.left[budget] > 0
            self.left[budget] -= again
        else:
            again = budget == "none"
        decision = f"again, {self.left[budget]} left" if again and budget in self.left else "again" if again else "end"
        JobLog(self.run_folder)(
            "failure", kind=cause.kind, failed_rank=cause.rank, error=cause.error.what, decision=decision
        )
        return FailureDecision.RETRY if again else FailureDecision.RAISE

    def _may_wait(self) -> bool:
        waited_s, limit_s = time.monotonic() - self._queued_since, self.queue_timeout_s
        free = available()
        need = ", ".join(f"{count:g} {name} ({free.get(name, 0):g} free)" for name, count in self.wanted.items())
        JobLog(self.run_folder)("waiting", need=need, waited_s=round(waited_s), queue_timeout_s=limit_s)
        if limit_s is None or waited_s < limit_s:
            return True
        self.left["start"] = 0
        return False

    def _budget(self, cause: Cause, error: TrainingFailedError, progress: Progress) -> str:
        """`worker`, `start`, `none` (always again) or `final` (never)."""
        if cause.kind == "drained":
            return "none"
        if cause.kind == "error":
            return "final"
        if isinstance(error, ControllerError):
            return "start" if isinstance(error.controller_failure, RETRYABLE_CONTROLLER_ERRORS) else "final"
        # Each group of workers counts an attempt of its own; without a new one, or before its first step, it had not
        # begun.
        begun = progress.get("attempt", 0) > self._last_attempt and progress.get("state") != "starting"
        return "worker" if begun else "start"


def available() -> Mapping[str, float]:
    """Resources of the cluster that nobody uses now."""
    import ray

    free: dict[str, float] = ray.available_resources()
    return free


class Queued(ScalingPolicy):
    """Asks for room unless another run goes first; before one of Ray's policies among the bases, which `super()` is."""

    queue: Queue

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Later, or as Ray's policy says."""
        if self.queue.waits():
            time.sleep(1.0)  # the controller asks again at once
            return NoopDecision()
        return super().make_decision_for_non_running_worker_group()  # type: ignore[safe-super]

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """The run has its room."""
        self.queue.leave()
        return super().make_decision_for_running_worker_group(  # type: ignore[safe-super]
            worker_group_state, worker_group_status
        )


class LegalCounts(Queued, ElasticScalingPolicy):
    """Ray's elastic policy, kept to counts that divide the batch; growing waits for a save.

    Ray kills a healthy group to make it larger, which costs all steps since the last checkpoint. Here the run is asked
    to stop instead, and the driver starts it again.
    """

    def __init__(
        self, scaling_config: ScalingConfig, *, counts: tuple[int, ...], run_folder: Path, queue: Queue
    ) -> None:
        super().__init__(scaling_config)
        self.counts = counts
        self.run_folder = run_folder
        self.queue = queue

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= possible), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resize; ask for a stop where there is room for more."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        now = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and decision.num_workers > now:
            request_stop(self.run_folder, f"{MORE_ROOM}: {decision.num_workers} in place of {now}")
        return NoopDecision()


class FixedCount(Queued, FixedScalingPolicy):
    """Ray's policy of a fixed count, for a cluster that does not grow: it sends no requests for resources.

    Ray's own starts a process to ask an autoscaler through, and waits for it; the placement group of the workers asks
    for the same.
    """

    def __init__(self, scaling_config: ScalingConfig, *, queue: Queue) -> None:
        super().__init__(scaling_config)
        self.queue = queue

    def after_controller_start(self, train_run_context: Any) -> None:
        """Do nothing: no client for the requests is made, so none is cancelled at the end."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(DataParallelTrainer):
    """Ray's trainer with policies from above in place of its own.

    Args:
        args, more: Ray's own.
        failures: what is worth another try.
        counts: how many workers run; None leaves it to Ray's own policy.
    """

    def __init__(self, *args: Any, failures: Failures, counts: ScalingPolicy | None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._failures = failures
        self._counts = counts

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, NOT_NEEDED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = self._failures
        if self._counts is not None:
            parts["scaling_policy"] = self._counts
        return super()._initialize_and_run_controller(**parts)
