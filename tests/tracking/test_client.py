from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from echox.errors import LaunchError
from echox.tracking import client as client_module
from echox.tracking import spool
from echox.tracking import state as state_module
from echox.tracking.run import attach, close_orphan, open_run
from echox.tracking.system import SystemMetrics
from tests.tracking.parts import DEAD, Threads, on_sqlite, points, recipe, until


def mlflow_run(storage: Path, run_id: str | None) -> Any:
    assert run_id is not None
    return MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(run_id)


def test_stages_are_children_of_one_parent_and_workers_share_the_run(storage: Path) -> None:
    first = open_run(recipe(), {"optim": {"steps": 3}}, storage=storage, recipe_name="demo/s2t")
    worker = attach(first.handle, "rank0")
    for step in range(3):
        worker.log_metrics({"loss/total": 3.0 - step, "bad name[0]": 1.0}, step)
    note = storage / "note.txt"
    note.write_text("kept")
    worker.artifact(note, "notes")
    worker.set_tags({"checkpoint": "step-00000003"})
    worker.finish("FINISHED")
    assert mlflow_run(storage, first.handle.run_id).info.status == "RUNNING"
    first.finish("FINISHED")

    second = open_run(recipe("tiny-t2c", "t2c"), {}, storage=storage)
    assert mlflow_run(storage, second.handle.parent_id).info.status == "RUNNING"
    second.finish("FAILED")

    assert first.handle.parent_id == second.handle.parent_id
    done = mlflow_run(storage, first.handle.run_id)
    assert done.info.status == "FINISHED"
    assert done.data.params == {"optim.steps": "3"}
    assert done.data.tags["mlflow.parentRunId"] == first.handle.parent_id
    wanted = {"scale": "tiny", "stage": "s2t", "recipe": "demo/s2t", "attempt": "1", "checkpoint": "step-00000003"}
    assert wanted.items() <= done.data.tags.items()
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    history = client.get_metric_history(done.info.run_id, "loss/total")
    assert [(point.step, point.value) for point in history] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert done.data.metrics["bad name_0_"] == 1.0
    assert (storage / "mlflow-artifacts" / done.info.run_id / "artifacts/notes/note.txt").read_text() == "kept"
    assert mlflow_run(storage, second.handle.run_id).info.status == "FAILED"
    assert mlflow_run(storage, second.handle.parent_id).info.status == "FAILED"


def test_a_resume_continues_the_run_and_keeps_its_parameters(storage: Path) -> None:
    first = open_run(recipe(), {"lr": 1, "steps": 5}, storage=storage)
    first.finish("KILLED")
    again = open_run(recipe(), {"lr": 2, "steps": 5, "added": True}, storage=storage)
    again.finish("FINISHED")
    assert again.handle.run_id == first.handle.run_id
    done = mlflow_run(storage, again.handle.run_id)
    assert done.data.params == {"lr": "1", "steps": "5", "added": "true"}
    assert done.data.tags["attempt.2.lr"] == "2"
    assert "attempt.2.steps" not in done.data.tags
    assert done.data.tags["attempt"] == "2"
    assert done.info.status == "FINISHED"


def test_a_repeated_stage_gets_a_new_run(storage: Path) -> None:
    first = open_run(recipe(), {}, storage=storage)
    first.finish("FINISHED")
    (first.handle.run_folder / state_module.STATE_FILE).unlink()
    second = open_run(recipe(), {}, storage=storage)
    second.finish("FINISHED")
    assert second.handle.run_id != first.handle.run_id
    assert second.handle.attempt == 1


def test_a_dead_server_costs_one_warning_and_no_metric(
    storage: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    with caplog.at_level(logging.WARNING, "echox.tracking"):
        tracker = open_run(recipe(uri=DEAD), {"lr": 1}, storage=storage)
        assert tracker.handle.run_id is None
        worker = attach(tracker.handle, "rank0")
        for step in range(1000):
            worker.log_metrics({"loss/total": float(step)}, step)
        worker.finish("FINISHED")
    assert threads.asking and threads.writing and not threads.waits()
    assert len([record for record in caplog.records if record.name == "echox.tracking"]) == 1
    left = [spool.read(path)[0] for path in spool.pending(tracker.handle.spool_folder)]
    assert sum(len(found) for found in left) == 1001

    # The server comes back before the end: the owner creates the run and delivers every process's journal.
    back = f"sqlite:///{storage}/mlflow.db"
    monkeypatch.setattr(client_module, "make_client", lambda uri: MlflowClient(back))
    tracker.finish("FINISHED")
    client = MlflowClient(back)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    done = client.search_runs([experiment.experiment_id], "tags.stage = 's2t'")[0]
    assert done.info.status == "FINISHED"
    assert done.data.params == {"lr": "1"}
    assert points(client, done.info.run_id) == [(step, float(step)) for step in range(1000)]
    assert not tracker.handle.spool_folder.exists()


def test_what_a_killed_worker_left_is_delivered_by_the_next_one_of_its_role(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    left = spool.Spool(tracker.handle.spool_folder, "rank0")
    left.append([{"kind": "metrics", "runs": ["stage"], "items": [["loss/total", 1.5, 1000, 7]]}])
    worker = attach(tracker.handle, "rank0")
    worker.log_metrics({"loss/total": 1.0}, 8)
    worker.finish("FINISHED")
    assert tracker.handle.run_id is not None
    assert points(on_sqlite(storage), tracker.handle.run_id) == [(7, 1.5), (8, 1.0)]
    assert not left.path.exists()
    tracker.finish()


def test_what_the_server_will_never_take_is_put_aside_and_holds_up_nothing(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    left = spool.Spool(tracker.handle.spool_folder, "rank0")
    left.append([{"kind": "tags", "items": {"a//b": "not a name"}}])
    worker = attach(tracker.handle, "rank0")
    worker.log_metrics({"loss/total": 1.0}, 1)
    worker.finish("FINISHED")
    tracker.finish()
    assert mlflow_run(storage, tracker.handle.run_id).data.metrics["loss/total"] == 1.0
    assert "a//b" in (tracker.handle.spool_folder / "refused.jsonl").read_text()
    assert "refuses" in caplog.text


def test_a_store_that_takes_no_artifacts_holds_up_neither_metrics_nor_the_end(
    storage: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(self: MlflowClient, run_id: str, path: str, folder: str | None = None) -> None:
        raise RuntimeError("no credentials for s3://me:s3cr3t@bucket")

    files = [storage / name for name in ("one.txt", "two.txt")]
    for file in files:
        file.write_text(file.name)
    monkeypatch.setattr(MlflowClient, "log_artifact", closed)
    tracker = open_run(recipe(), {}, storage=storage)
    worker = attach(tracker.handle, "rank0")
    for step in range(11):
        worker.log_metrics({"loss/total": float(step)}, step)
        if step in (1, 5):
            worker.artifact(files[step // 5], "config")
    worker.finish("FINISHED")
    tracker.finish("FINISHED")
    run_id = tracker.handle.run_id
    assert run_id is not None and points(on_sqlite(storage), run_id) == [(step, float(step)) for step in range(11)]
    assert mlflow_run(storage, run_id).info.status == "FINISHED"
    assert 1 <= caplog.text.count("was not stored") <= 3 and "s3cr3t" not in caplog.text
    (waiting,) = tracker.handle.spool_folder.glob("*.later")
    assert [Path(each["path"]) for each in spool.read_postponed(waiting)] == files

    monkeypatch.undo()  # the store is opened: what waits is stored with the run's next start
    again = open_run(recipe(), {}, storage=storage)
    again.finish("FINISHED")
    assert [item.path for item in on_sqlite(storage).list_artifacts(run_id, "config")] == [
        "config/one.txt",
        "config/two.txt",
    ]
    assert not again.handle.spool_folder.exists()


@pytest.mark.parametrize("name", ["O'Brien", 'the "big" one', """both ' and \"""", "a%b_c`d", "ü → ok"])
def test_stages_find_their_parent_whatever_its_name(storage: Path, name: str) -> None:
    parents = set()
    for run in ("one", "two"):
        tracker = open_run(recipe(name=run, parent=name), {}, storage=storage)
        tracker.finish("FINISHED")
        parents.add(tracker.handle.parent_id)
    (parent,) = parents
    assert parent is not None and mlflow_run(storage, parent).info.run_name == name


def test_an_experiment_that_was_deleted_is_restored(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_run(recipe(name="one"), {}, storage=storage).finish("FINISHED")
    client = on_sqlite(storage)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    tracker = open_run(recipe(name="two"), {}, storage=storage)
    tracker.finish("FINISHED")
    assert tracker.handle.run_id is not None
    assert mlflow_run(storage, tracker.handle.run_id).info.status == "FINISHED" and "restored" in caplog.text


def test_a_full_disk_neither_blocks_nor_grows_and_is_said(
    storage: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, operations: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.Spool, "append", full)
    monkeypatch.setattr(client_module, "QUEUE_LIMIT", 50)
    monkeypatch.setattr(client_module, "DISK_RETRY_S", 0.05)
    tracker = open_run(recipe(), {}, storage=storage)
    until(lambda: "No space left" in caplog.text)
    for step in range(500):
        tracker.log_metrics({"loss/total": 1.0}, step)
    assert tracker._queue.qsize() <= 50
    tracker.finish()
    assert "were dropped" in caplog.text
    assert mlflow_run(storage, tracker.handle.run_id).info.status == "FINISHED"


def test_a_second_start_of_a_living_run_is_refused(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    folder = tracker.handle.run_folder
    state_module.update_state(folder, owner=state_module.Process("elsewhere", 1, 1).record())
    state_module.beat(folder)
    stop, an_hour_ago = threading.Event(), time.time() - 3600

    def beats() -> None:
        while not stop.wait(0.3):
            state_module.beat(folder)
            os.utime(folder / state_module.ALIVE_FILE, (an_hour_ago, an_hour_ago))  # by the clock of that machine

    other_machine = threading.Thread(target=beats)
    other_machine.start()
    try:
        with pytest.raises(LaunchError, match="being trained by process 1 on elsewhere") as raised:
            open_run(recipe(), {}, storage=storage)
        assert "name=" in str(raised.value)
    finally:
        stop.set()
        other_machine.join()
    state_module.update_state(folder, owner=state_module.Process.current().record())
    tracker.finish()


def test_the_file_that_asks_for_a_stop_is_the_engines() -> None:
    from echox.engine.stop import STOP_FILE

    assert state_module.STOP_FILE == STOP_FILE


def test_a_killed_driver_leaves_no_run_running(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    assert close_orphan(tracker.handle.run_folder)
    assert mlflow_run(storage, tracker.handle.run_id).info.status == "KILLED"
    assert mlflow_run(storage, tracker.handle.parent_id).info.status == "KILLED"
    assert not close_orphan(tracker.handle.run_folder)


def test_system_metrics_carry_the_node_and_stop_when_closed() -> None:
    seen: list[tuple[dict[str, float], int]] = []

    class Sink:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            seen.append((metrics, step))

    sampler = SystemMetrics(Sink(), node="node-1", interval_s=0.05)
    until(lambda: len(seen) >= 2)
    sampler.close()
    count = len(seen)
    assert [step for _, step in seen] == list(range(count))
    assert {"system/node-1/cpu_utilization_percentage", "system/node-1/process_memory_gib"} <= seen[0][0].keys()
    time.sleep(0.15)
    assert len(seen) == count
