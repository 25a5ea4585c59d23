from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from echox.tracking.delivery import Delivery
from echox.tracking.run import attach, open_run
from tests.tracking.parts import children, on_sqlite, points, recipe, until


def run_attempt(handle: Any, attempt: int, steps: range, *, offset: float = 0.0, end: str | None = None) -> None:
    """A first rank that begins an attempt, logs steps and, unless it dies, ends it."""
    worker = attach(handle, "rank0")
    worker.begin_attempt(attempt, steps.start - 1, {"hosts": f"node-{attempt}"})
    for step in steps:
        worker.log_metrics({"loss/total": step + offset, "perf/step_ms": 10.0 * attempt}, step)
        worker.log_metrics({"valid/loss/total": step + offset}, step)
    if end is not None:
        worker.end_attempt(end, {"ended": "all steps done"})
    worker.finish("FINISHED")


def test_every_attempt_is_a_child_and_the_stage_run_shows_each_step_once(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    run_attempt(tracker.handle, 1, range(1, 8))  # dies after step 7
    client = on_sqlite(storage)
    run_id = tracker.handle.run_id
    assert run_id is not None
    assert children(client, run_id)["tiny-s2t-attempt-1"].info.status == "RUNNING"
    run_attempt(tracker.handle, 2, range(5, 11), offset=0.5, end="FINISHED")  # goes on from step 4
    tracker.finish("FINISHED")

    found = children(client, run_id)
    first, second = found["tiny-s2t-attempt-1"], found["tiny-s2t-attempt-2"]
    assert (first.info.status, second.info.status) == ("FAILED", "FINISHED")
    assert first.info.end_time is not None
    wanted = {"attempt": "2", "from_step": "4", "hosts": "node-2", "ended": "all steps done", "stage": "s2t"}
    assert wanted.items() <= second.data.tags.items()
    once = [(step, step + (0.0 if step < 8 else 0.5)) for step in range(1, 11)]
    assert points(client, run_id) == once
    assert points(client, run_id, "valid/loss/total") == once
    assert points(client, first.info.run_id) == [(step, float(step)) for step in range(1, 8)]
    assert points(client, second.info.run_id) == [(step, step + 0.5) for step in range(5, 11)]
    assert points(client, second.info.run_id, "perf/step_ms")[0] == (5, 20.0)
    stage = client.get_run(run_id)
    assert {"attempt": "2", "attempt.2.from_step": "4"}.items() <= stage.data.tags.items()
    assert set(children(client, tracker.handle.parent_id or "")) == {"tiny-s2t"}


def test_a_new_start_closes_the_attempt_that_died_with_the_old_one(storage: Path) -> None:
    first = open_run(recipe(), {}, storage=storage)
    run_attempt(first.handle, 1, range(1, 3))
    second = open_run(recipe(), {}, storage=storage)
    client, run_id = on_sqlite(storage), second.handle.run_id
    assert run_id is not None and run_id == first.handle.run_id
    assert children(client, run_id)["tiny-s2t-attempt-1"].info.status == "FAILED"
    run_attempt(second.handle, 2, range(3, 5))
    second.finish("KILLED")
    assert children(client, run_id)["tiny-s2t-attempt-2"].info.status == "KILLED"
    first.finish("FINISHED")


def test_numbers_of_attempts_follow_the_engines_count(storage: Path) -> None:
    first = open_run(recipe(), {"lr": 1}, storage=storage)
    (first.handle.run_folder / "attempt").write_text("3\n")  # the workers were started three times
    first.finish("FAILED")
    second = open_run(recipe(), {"lr": 2}, storage=storage)
    second.finish("FINISHED")
    assert second.handle.attempt == 4
    assert on_sqlite(storage).get_run(second.handle.run_id or "").data.tags["attempt.4.lr"] == "2"


def test_a_value_that_was_no_number_gives_way_to_the_one_of_the_next_attempt(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    worker = attach(tracker.handle, "rank0")
    worker.begin_attempt(1, 0, {})
    worker.log_metrics({"loss/total": 2.0}, 1)
    worker.log_metrics({"loss/total": math.nan}, 2)
    worker.finish()
    run_attempt(tracker.handle, 2, range(2, 4), end="FINISHED")
    tracker.finish()
    history = points(on_sqlite(storage), tracker.handle.run_id or "")
    assert [point for point in history if math.isfinite(point[1])] == [(1, 2.0), (2, 2.0), (3, 3.0)]
    assert len(history) == 4


def test_system_metrics_of_all_nodes_go_to_the_attempt(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1111")
    tracker = open_run(recipe(), {}, storage=storage)
    run_attempt(tracker.handle, 1, range(1, 3))
    monkeypatch.setenv("MASTER_PORT", "2222")  # the workers of another start meet elsewhere
    other_node = attach(tracker.handle, "rank8")
    first_rank = attach(tracker.handle, "rank0")
    for node, sampler in (("node-0", first_rank), ("node-1", other_node)):
        sampler.log_metrics({f"system/{node}/cpu": 50.0}, 0)  # before the attempt is counted
    first_rank.begin_attempt(2, 2, {})
    until(lambda: (tracker.handle.run_folder / "mlflow-attempt.json").read_text().count('"attempt": 2'))
    other_node.log_metrics({"system/node-1/cpu": 60.0}, 1)
    other_node.finish()
    first_rank.finish()
    tracker.finish()
    client = on_sqlite(storage)
    found = children(client, tracker.handle.run_id or "")
    second = found["tiny-s2t-attempt-2"].info.run_id
    assert points(client, second, "system/node-0/cpu") == [(0, 50.0)]
    assert points(client, second, "system/node-1/cpu") == [(0, 50.0), (1, 60.0)]
    for run_id in (tracker.handle.run_id or "", found["tiny-s2t-attempt-1"].info.run_id):
        assert not [key for key in client.get_run(run_id).data.metrics if key.startswith("system/")]


def test_system_metrics_of_a_run_without_attempts_stay_with_the_run(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    tracker.log_metrics({"system/cpu": 1.0}, 0)
    tracker.finish()
    assert points(on_sqlite(storage), tracker.handle.run_id or "", "system/cpu") == [(0, 1.0)]


def test_a_delivery_cut_in_the_middle_is_repeated_without_a_second_point(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    run_id = tracker.handle.run_id
    assert run_id is not None
    client = on_sqlite(storage)
    items = [["loss/total", float(step), 1000 + step, step] for step in range(2500)]
    real, calls = client.log_batch, 0

    def cut(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("cut")
        real(*args, **kwargs)

    client.log_batch = cut  # type: ignore[method-assign]
    delivery = Delivery(client, run_id)
    operation = {"kind": "metrics", "runs": ["stage"], "items": items}
    with pytest.raises(ConnectionError):
        delivery.send(operation)
    for again in (delivery, Delivery(client, run_id)):
        again.send(operation)
    assert points(client, run_id) == [(step, float(step)) for step in range(2500)]
    tracker.finish()
