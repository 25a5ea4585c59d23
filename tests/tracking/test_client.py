from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from echox.tracking import client as client_module
from echox.tracking import run as run_module
from echox.tracking.run import attach, close_orphan, open_run
from echox.tracking.system import SystemMetrics

DEAD = "http://127.0.0.1:9"


def recipe(name: str = "tiny-s2t", stage: str = "s2t", uri: str | None = None) -> Any:
    tracking = SimpleNamespace(uri=uri, experiment="tests", parent_run="tiny", system_metrics=True)
    return SimpleNamespace(name=name, stage=stage, scale="tiny", tracking=tracking)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite store whose tables exist; creating them takes seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def storage(tmp_path: Path, template: bytes) -> Path:
    (tmp_path / "mlflow.db").write_bytes(template)
    return tmp_path


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
    (first.handle.run_folder / run_module.STATE_FILE).unlink()
    second = open_run(recipe(), {}, storage=storage)
    second.finish("FINISHED")
    assert second.handle.run_id != first.handle.run_id
    assert second.handle.attempt == 1


def test_a_dead_server_costs_one_warning_and_no_metric(
    storage: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with caplog.at_level(logging.WARNING, "echox.tracking"):
        tracker = open_run(recipe(uri=DEAD), {"lr": 1}, storage=storage)
        worker = attach(tracker.handle, "rank0")
        start = time.monotonic()
        for step in range(1000):
            worker.log_metrics({"loss/total": float(step)}, step)
        assert time.monotonic() - start < 0.5
        worker.finish("FINISHED")
    assert len([record for record in caplog.records if record.name == "echox.tracking"]) == 1
    assert (tracker.handle.spool_folder / "rank0.jsonl").exists()

    # The server comes back before the end: the owner creates the run and delivers every writer's spool.
    back = f"sqlite:///{storage}/mlflow.db"
    monkeypatch.setattr(client_module, "make_client", lambda uri: MlflowClient(back))
    tracker.finish("FINISHED")
    client = MlflowClient(back)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    done = client.search_runs([experiment.experiment_id], "tags.stage = 's2t'")[0]
    assert done.info.status == "FINISHED"
    assert done.data.params == {"lr": "1"}
    assert len(client.get_metric_history(done.info.run_id, "loss/total")) == 1000
    assert not tracker.handle.spool_folder.exists()


def test_a_server_lost_in_mid_run_is_spooled_then_delivered(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., None] = client_module.send
    down = True

    def send(*args: Any) -> None:
        if down:
            raise ConnectionError("gone")
        real(*args)

    tracker = open_run(recipe(), {}, storage=storage)
    worker = attach(tracker.handle, "rank0")
    monkeypatch.setattr(client_module, "send", send)
    worker.log_metrics({"loss/total": 1.5}, 7)
    worker.finish("FINISHED")
    assert (tracker.handle.spool_folder / "rank0.jsonl").exists()
    down = False
    tracker.finish("FINISHED")
    assert mlflow_run(storage, tracker.handle.run_id).data.metrics["loss/total"] == 1.5


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
    time.sleep(0.4)
    sampler.close()
    count = len(seen)
    assert count >= 2
    assert [step for _, step in seen] == list(range(count))
    assert {"system/node-1/cpu_utilization_percentage", "system/node-1/process_memory_gib"} <= seen[0][0].keys()
    time.sleep(0.15)
    assert len(seen) == count
