"""A real MLflow server that is killed and comes back, and servers that are as good as dead."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from echox.tracking import client as client_module
from echox.tracking.run import attach, open_run
from tests.tracking.parts import Server, Threads, children, on_sqlite, points, recipe, until, watchers


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_mid_run_gets_everything_once_and_in_order(
    storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FLUSH_S", 0.1)
    monkeypatch.setattr(client_module, "RETRY_S", 1.0)
    server.start()
    tracker = open_run(recipe(uri=server.uri), {}, storage=storage)
    worker = attach(tracker.handle, "rank0")
    worker.begin_attempt(1, 0, {})
    run_id, store = tracker.handle.run_id, on_sqlite(storage)
    assert run_id is not None
    threads, step, back = Threads(monkeypatch), 0, [False]

    def restart() -> None:
        server.start()
        back[0] = True

    def log_steps(until_: Any) -> None:
        nonlocal step
        while not until_():
            step += 1
            worker.log_metrics({"loss/total": float(step), "perf/step_ms": 1.0}, step)
            time.sleep(0.05)

    log_steps(lambda: points(store, run_id))
    server.kill()
    died = step
    log_steps(lambda: step >= died + 20)
    starting = threading.Thread(target=restart)
    starting.start()
    log_steps(lambda: back[0])
    starting.join()
    wanted = [(number, float(number)) for number in range(1, step + 1)]
    until(lambda: points(store, run_id) == wanted, 200)  # while the run goes on
    child = children(store, run_id)["tiny-s2t-attempt-1"]
    until(lambda: points(store, child.info.run_id) == wanted)
    worker.end_attempt("FINISHED", {})
    worker.finish()
    tracker.finish()
    assert points(store, run_id) == points(store, child.info.run_id) == wanted
    assert store.get_run(run_id).info.status == "FINISHED"
    assert threads.asking and threads.writing and not threads.waits()


@pytest.mark.slow
def test_a_server_that_comes_up_after_the_start_gets_the_run_before_its_end(
    storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", 1.0)
    tracker = open_run(recipe(uri=server.uri), {"lr": 1}, storage=storage)
    assert tracker.handle.run_id is None
    worker = attach(tracker.handle, "rank0")
    worker.log_metrics({"loss/total": 1.0}, 1)
    server.start()
    run_id = until(lambda: tracker.handle.run_id)
    until(lambda: points(on_sqlite(storage), run_id) == [(1, 1.0)])
    worker.finish()
    tracker.finish()
    assert on_sqlite(storage).get_run(run_id).data.params == {"lr": "1"}


@contextmanager
def slow_way_to(server: Server | None, delay_s: float) -> Iterator[str]:
    """An address whose every answer comes `delay_s` late; without a server it takes connections and is silent."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ends: list[socket.socket] = [listener]

    def pass_on(source: socket.socket, target: socket.socket, late: float = 0) -> None:
        heard = 0.0
        try:
            while block := source.recv(1 << 16):
                if time.monotonic() - heard > 1:  # the beginning of an answer
                    time.sleep(late)
                heard = time.monotonic()
                target.sendall(block)
        except OSError:
            pass
        with suppress(OSError):  # unlike a close, heard by the end that waits for more
            target.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        if server is None:
            return
        behind = socket.create_connection(("127.0.0.1", server.port))
        open_ends.append(behind)
        threading.Thread(target=pass_on, args=(behind, client, delay_s), daemon=True).start()
        pass_on(client, behind)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            open_ends.append(client)
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for end in open_ends:
            end.close()


def per_call(worker: Any, calls: int = 2000) -> float:
    """Seconds of processor time that a call of `log_metrics` with forty values takes in the middle.

    Neither the median nor the thread's own clock minds other work on the machine.
    """
    metrics = {f"loss/part-{index}": float(index) for index in range(40)}
    spent = []
    for step in range(calls):
        began = time.thread_time()
        worker.log_metrics(metrics, step)
        spent.append(time.thread_time() - began)
    return sorted(spent)[calls // 2]


def test_a_server_that_never_answers_costs_training_microseconds_and_the_end_a_bounded_time(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echox.tracking import run as run_module

    monkeypatch.setattr(run_module, "CREATE_S", 1.0)
    monkeypatch.setattr(client_module, "FINISH_S", 2.0)
    threads = Threads(monkeypatch)
    with slow_way_to(None, 0) as uri:
        began = time.monotonic()
        tracker = open_run(recipe(uri=uri, hours=0), {}, storage=storage)
        assert tracker.handle.run_id is None
        worker = attach(tracker.handle, "rank0")
        spent = per_call(worker)
        print(f"log_metrics of 40 values: {spent * 1e6:.1f} us")
        assert spent < 200e-6 and not threads.waits()
        worker.finish()
        tracker.finish()
        assert time.monotonic() - began < 15
    left = sorted((tracker.handle.spool_folder).glob("*rank0*.jsonl"))
    assert sum(path.read_text().count("loss/part-39") for path in left) == 2000


@pytest.mark.slow
def test_a_server_that_answers_after_half_a_minute_still_gets_it_all(
    storage: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    tracker = open_run(recipe(uri=server.uri), {}, storage=storage)
    run_id = tracker.handle.run_id or ""
    with slow_way_to(server, 30.0) as uri:
        from dataclasses import replace

        worker = attach(replace(tracker.handle, uri=uri), "rank0")
        threads = Threads(monkeypatch)
        assert per_call(worker, 50) < 200e-6 and not threads.waits()
        store = MlflowClient(server.uri)
        until(lambda: len(points(store, run_id, "loss/part-39")) == 50, 400)
        began = time.monotonic()
        worker.finish()
        assert time.monotonic() - began < 12
    tracker.finish()


@pytest.mark.slow
def test_a_server_with_a_login_gets_all_once_the_login_is_right_and_artifacts_go_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    password, storage = "s3cr3t-9f-long-enough", tmp_path / "runs"
    (tmp_path / "server").mkdir()
    storage.mkdir()
    monkeypatch.setattr(client_module, "RETRY_S", 1.0)
    monkeypatch.setattr(client_module, "ARTIFACT_RETRY_S", 1.0)
    server = Server(tmp_path / "server", password)
    try:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tracker = open_run(recipe(), {"lr": 1}, storage=storage)
        worker = attach(tracker.handle, "rank0")
        worker.begin_attempt(1, 0, {})
        for step in (1, 2, 3):
            worker.log_metrics({"loss/total": float(step)}, step)
        (storage / "note.txt").write_text("kept")
        tracker.artifact(storage / "note.txt")
        assert tracker.handle.run_id is None and "401" in caplog.text
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        run_id = until(lambda: tracker.handle.run_id)
        worker.end_attempt("FINISHED", {})
        worker.finish()
        tracker.finish()
        client = MlflowClient(server.uri)
        assert points(client, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert client.get_run(run_id).info.status == "FINISHED"
        experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
        assert experiment.artifact_location.startswith("mlflow-artifacts:")
        (served,) = (tmp_path / "server" / "served").rglob("note.txt")
        assert served.read_text() == "kept"
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    finally:
        server.kill()
        for pid in watchers(storage / "tiny-s2t"):
            os.kill(pid, signal.SIGKILL)
    kept = [path for path in storage.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert kept == [] and password not in caplog.text, "the password is nowhere"
