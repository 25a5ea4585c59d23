"""The recovery bench: what it makes of a run's events, and that it measures a real loss."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from echox.cli import main
from launch.events import JobEvent
from launch.recovery import Recovery, recovery, table


def event(time: float, name: str, rank: int | str = 0, step: int = 0, **more: Any) -> JobEvent:
    return cast(JobEvent, {"time": time, "event": name, "rank": rank, "step": step, "attempt": 1, **more})


PARTS = {"imports": 4.0, "run": 1.0, "models": 2.0}
BEFORE = [event(90, "start", step=0, start_s=PARTS), event(99, "step", step=7)]


def test_a_lost_worker_is_split_into_notice_start_and_steps_done_again() -> None:
    events = [
        *BEFORE,
        event(102, "job_failure", "driver"),
        event(110, "start", 1, 5, start_s=PARTS),
        event(111, "start", step=5, start_s=PARTS),
        event(113, "step", step=6),
        event(114, "step", step=7),
        event(116.5, "step", step=8),
        event(118, "step", step=9),
    ]
    found = recovery("worker", events, killed=100.0, done=7)
    assert (found.seconds, found.steps_again) == (16.5, 2)
    assert found.parts == {"notice": 2.0, "workers": 2.0, **PARTS, "step": 2.0, "again": 3.5}
    assert sum(found.parts.values()) == found.seconds


def test_a_lost_driver_has_a_part_of_its_own() -> None:
    events = [
        *BEFORE,
        event(100.5, "job_driver_lost", "driver"),
        event(106.5, "job_start", "driver"),
        event(115, "start", step=5, start_s=PARTS),
        event(116, "step", step=6),
        event(118, "step", step=8),
    ]
    found = recovery("driver", events, killed=100.0, done=7)
    assert found.parts == {"notice": 0.5, "driver": 6.0, "workers": 1.5, **PARTS, "step": 1.0, "again": 2.0}
    assert table([found]).startswith("driver     18.0 s (aim 60)  2 steps again: notice 0.5, driver 6.0")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_loss_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "recovery", "--lose", "worker", "--json"]) == 0
    (found,) = (Recovery(**each) for each in json.loads(capsys.readouterr().out))
    assert found.lost == "worker" and 0 <= found.steps_again <= 5
    assert found.seconds == pytest.approx(sum(found.parts.values()), abs=1.0)
