"""Gauges of a run: the engine's metrics under their names, and nothing that could stop training."""

from __future__ import annotations

import inspect
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from echox.engine.interfaces import NullTracker, Tracker
from launch.job import gauges
from launch.job.gauges import ATTEMPT, OF_METRICS, STEP, Gauges

ROOT = Path(__file__).resolve().parents[3]
RUN = {"run": "3b-s2t", "stage": "s2t"}


class Recorder(NullTracker):
    in_one_file = True

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []


def recording(name: str) -> Any:
    return lambda self, *given: self.calls.append((name, *given))


METHODS = [name for name, _ in inspect.getmembers(NullTracker, inspect.isfunction)]
for method in METHODS:
    setattr(Recorder, method, recording(method))


class FakeGauge:
    def __init__(self) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeGauge]:
    found: dict[str, FakeGauge] = {}

    def make(name: str, description: str) -> FakeGauge:
        assert name not in found, "a gauge is made once"
        return found.setdefault(name, FakeGauge())

    monkeypatch.setattr(gauges, "_gauge", make)
    return found


def test_metrics_are_shown_by_run_and_stage(made: dict[str, FakeGauge]) -> None:
    tracker = Gauges(Recorder(), **RUN)
    tracker.begin_attempt(2, 30, {})
    tracker.log_metrics({"loss/total": 1.5, "perf/step_ms": 800.0, "lr/lora": 1e-4}, 31)
    tracker.log_metrics({"loss/total": math.nan, "perf/save_s": 4}, 32)
    shown = {name: [value for value, _ in gauge.values] for name, gauge in made.items()}
    assert shown.keys() == {"echox_attempt", "echox_step", "echox_loss", "echox_step_ms", "echox_save_s"}
    assert shown["echox_attempt"] == [2] and shown["echox_step"] == [30, 31, 32]
    assert shown["echox_step_ms"] == [800] and shown["echox_save_s"] == [4]
    assert shown["echox_loss"][0] == 1.5 and math.isnan(shown["echox_loss"][1])
    assert all(tags == RUN for gauge in made.values() for _, tags in gauge.values)


def test_everything_reaches_the_tracker(made: dict[str, FakeGauge]) -> None:
    kept = Recorder()
    tracker: Tracker = Gauges(kept, **RUN)
    given: dict[str, tuple[Any, ...]] = {
        "log_metrics": ({"loss/total": 1.0, "lr/lora": 1e-4}, 3),
        "log_params": ({"a": 1},),
        "artifact": (Path("a"), "folder"),
        "set_tags": ({"a": "b"},),
        "begin_attempt": (2, 30, {"host": "h"}),
        "end_attempt": ("KILLED", {"ended": "x"}),
        "finish": ("FINISHED",),
    }
    assert given.keys() == set(METHODS)
    for name, words in given.items():
        getattr(tracker, name)(*words)
    assert kept.calls == [(name, *words) for name, words in given.items()] and tracker.in_one_file


@pytest.mark.parametrize("where", ["make", "set"])
def test_metrics_that_fail_cost_one_warning_and_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    class Broken:
        def set(self, value: float, tags: dict[str, str]) -> None:
            raise RuntimeError("no agent")

    def make(name: str, description: str) -> Broken:
        if where == "make":
            raise RuntimeError("no agent")
        return Broken()

    monkeypatch.setattr(gauges, "_gauge", make)
    kept = Recorder()
    tracker = Gauges(kept, **RUN)
    with caplog.at_level(logging.WARNING):
        tracker.begin_attempt(1, 0, {})
        tracker.log_metrics({"loss/total": 1.0}, 1)
    assert len(kept.calls) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the gauges of 3b-s2t end here, training goes on: no agent"
    ]


def test_the_names_are_of_metrics_that_the_engine_reports() -> None:
    """And Prometheus takes a name that ends in _total for a counter."""
    files = [*(ROOT / "echox" / "engine").rglob("*.py"), *(ROOT / "echox" / "stream").glob("*.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    stages = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "echox" / "stages").glob("*.py"))
    shares = {f"perf/{part}_share" for part in re.findall(r'\.timed\("(\w+)"', stages)}
    assert [name for name in OF_METRICS if f'"{name}"' not in source and name not in shares] == []
    names = [gauge.name for gauge in (STEP, ATTEMPT, *OF_METRICS.values())]
    assert len(set(names)) == len(names)
    assert all(name.startswith("echox_") and not name.endswith("_total") for name in names)
