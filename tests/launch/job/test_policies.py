"""What the policies decide: a run that finds no room waits and says for what, and spends no failure on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

from launch.events import read_events
from launch.job import policies
from launch.job.policies import Failures

NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(4))
CANNOT_START = ControllerError(WorkerGroupStartupFailedError("its process ended"))


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(policies.time, "monotonic", made.monotonic)
    monkeypatch.setattr(policies, "available", lambda: {"CPU": 30.0, "GPU": 3.0})
    return made


def failures(folder: Path, queue_timeout_s: float | None = None) -> Failures:
    return Failures(
        FailureConfig(),
        max_failures=0,
        max_start_failures=1,
        run_folder=folder,
        wanted={"CPU": 16.0, "GPU": 4.0, "TPU": 1.0},
        queue_timeout_s=queue_timeout_s,
    )


def waits(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(event)) for event in read_events(folder) if event["event"] == "job_waiting"]


def test_a_queued_run_waits_without_end_and_spends_no_failure(tmp_path: Path, clock: Clock) -> None:
    policy = failures(tmp_path)
    for _ in range(200):
        clock.now += 60
        assert policy.make_decision(NO_ROOM) == FailureDecision.RETRY
    assert policy.left == {"worker": 0, "start": 1}
    last = waits(tmp_path)[-1]
    assert last["need"] == "16 CPU (30 free), 4 GPU (3 free), 1 TPU (0 free)" and last["waited_s"] == 12_000
    assert policy.make_decision(CANNOT_START) == FailureDecision.RETRY
    assert policy.make_decision(CANNOT_START) == FailureDecision.RAISE, "that is a failure, and counts"


def test_waiting_ends_where_an_end_is_wanted_and_begins_anew_after_a_start(tmp_path: Path, clock: Clock) -> None:
    policy = failures(tmp_path, 100)
    clock.now += 60
    assert policy.make_decision(NO_ROOM) == FailureDecision.RETRY
    clock.now += 20
    assert policy.make_decision(CANNOT_START) == FailureDecision.RETRY
    clock.now += 99
    assert policy.make_decision(NO_ROOM) == FailureDecision.RETRY, "since the last start it has waited 99 s"
    clock.now += 1
    assert policy.make_decision(NO_ROOM) == FailureDecision.RAISE
    assert [event["waited_s"] for event in waits(tmp_path)] == [60, 99, 100]
    assert read_events(tmp_path)[-1]["decision"] == "end"
