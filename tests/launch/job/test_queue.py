"""Which of several queued runs asks for room."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from launch.events import read_events
from launch.job import queue as module
from launch.job.queue import ClusterBoard, Queue


class Notes:
    """A board of this process."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def put(self, run: str, note: str) -> None:
        self.held[run] = note

    def remove(self, run: str) -> None:
        self.held.pop(run, None)

    def notes(self) -> dict[str, str]:
        return dict(self.held)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made.monotonic)
    return made


def queued(folder: Path, name: str, priority: int, board: Notes, limit_s: float | None = None) -> Queue:
    return Queue(folder / name, priority, limit_s, board)


def test_the_higher_goes_first_and_equals_hinder_nobody(tmp_path: Path, clock: Clock) -> None:
    board = Notes()
    low, also_low, high = (queued(tmp_path, name, prio, board) for name, prio in (("low", 0), ("also", 0), ("high", 5)))
    assert not low.waits() and not also_low.waits()
    assert not high.waits()
    assert low.waits() and also_low.waits() and not high.waits()
    (event,) = [each for each in read_events(tmp_path / "low") if each["event"] == "job_waiting"]
    assert event["need"] == "run high (priority 5) goes first"  # type: ignore[typeddict-item]
    high.leave()
    assert not low.waits() and set(board.held) == {"low", "also"}
    low.leave()
    also_low.leave()
    assert board.held == {}


def test_the_note_of_a_killed_driver_holds_nobody_up_for_long(tmp_path: Path, clock: Clock) -> None:
    board = Notes()
    board.put("dead", '{"priority": 9, "beat": "last"}')
    board.put("odd", "no note")
    low = queued(tmp_path, "low", 0, board)
    assert low.waits()
    clock.now += module.DEAD_S - 1
    assert low.waits()
    board.put("dead", '{"priority": 9, "beat": "it lives"}')
    clock.now += 2
    assert low.waits()
    clock.now += module.DEAD_S + 1
    assert not low.waits()
    low.leave()


def test_a_note_is_kept_alive_while_the_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    board, seen = Notes(), set()
    low = queued(tmp_path, "low", 0, board)
    low.waits()
    while len(seen) < 4:
        seen.add(board.held["low"])
    low.leave()
    assert board.held == {}


def test_a_run_with_a_limit_asks_for_room_after_it(tmp_path: Path, clock: Clock) -> None:
    board = Notes()
    board.put("high", '{"priority": 9, "beat": "1"}')
    low = queued(tmp_path, "low", 0, board, limit_s=100)
    assert low.waits()
    clock.now += 101
    board.put("high", '{"priority": 9, "beat": "2"}')
    assert not low.waits()
    low.leave()


def test_it_travels_to_the_controller() -> None:
    assert pickle.loads(pickle.dumps(Queue(Path("/runs/x"), 1, None, ClusterBoard())))
