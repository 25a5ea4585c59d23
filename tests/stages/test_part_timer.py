from __future__ import annotations

import time

import pytest
import torch

from echox.stages.part_timer import PartTimer


def test_parts_add_up_until_they_are_read() -> None:
    timer, cpu = PartTimer(), torch.device("cpu")
    for _ in range(2):
        with timer.timed("teacher", cpu):
            time.sleep(0.02)
    found = timer.read("teacher", "other")
    assert found["teacher"] == pytest.approx(0.04, abs=0.03) and found["teacher"] >= 0.04
    assert found["other"] == 0.0
    assert timer.read("teacher") == {"teacher": 0.0}


def test_events_of_a_gpu_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append("record")

        def synchronize(self) -> None:
            marks.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PartTimer()
    with timer.timed("teacher", torch.device("cuda")):
        marks.append("decode")
    assert marks == ["record", "decode", "record"]
    assert timer.read("teacher") == {"teacher": 0.25} and marks[-1] == "wait"
