"""Real owner processes that are really killed."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from echox.engine.stop import request_stop
from echox.tracking.run import open_run, repair
from echox.tracking.state import Process, read_state, update_state
from tests.tracking.parts import Owner, Server, children, on_sqlite, points, recipe, until, watchers


def states(client: MlflowClient, folder: Path) -> dict[str, Any]:
    state = read_state(folder)
    attempts = children(client, state["run_id"])
    return {
        "parent": client.get_run(state["parent_id"]).info.status,
        "stage": client.get_run(state["run_id"]).info.status,
        "attempt": attempts["tiny-s2t-attempt-1"].info.status if attempts else None,
    }


def all_are(status: str) -> dict[str, str]:
    return {"parent": status, "stage": status, "attempt": status}


def test_the_run_of_a_killed_owner_fails_with_its_parent_and_attempt_and_lacks_nothing(storage: Path) -> None:
    owner = Owner(storage)
    owner.wait_ready()
    (watcher,) = watchers(owner.folder)
    memory = psutil.Process(watcher).memory_info().rss / 2**20
    assert os.getsid(watcher) not in (os.getsid(0), os.getsid(owner.process.pid))
    assert psutil.Process(watcher) not in psutil.Process(owner.process.pid).children(recursive=True)
    owner.kill()
    began = time.monotonic()
    client = on_sqlite(storage)
    until(lambda: read_state(owner.folder)["closed"])
    print(f"marked after {time.monotonic() - began:.1f} s, watcher {memory:.1f} MiB")
    assert states(client, owner.folder) == all_are("FAILED")
    assert points(client, read_state(owner.folder)["run_id"]) == [(step, float(step)) for step in range(1, 6)]
    assert memory < 40
    until(lambda: not watchers(owner.folder))
    assert "the run is FAILED" in (owner.folder / "mlflow-watcher.log").read_text()


def test_the_run_of_an_owner_killed_after_a_request_to_stop_counts_as_killed(storage: Path) -> None:
    owner = Owner(storage)
    owner.wait_ready()
    request_stop(owner.folder, "the test says so")
    owner.kill()
    until(lambda: read_state(owner.folder)["closed"])
    assert states(on_sqlite(storage), owner.folder) == all_are("KILLED")


def test_a_watcher_leaves_when_the_owner_has_ended_the_run(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    folder = tracker.handle.run_folder
    assert len(watchers(folder)) == 1
    tracker.finish("FINISHED")
    until(lambda: not watchers(folder), 10)
    assert on_sqlite(storage).get_run(tracker.handle.run_id or "").info.status == "FINISHED"
    assert not (folder / "mlflow-watcher.log").exists()


def test_another_process_with_the_owners_number_is_not_the_owner() -> None:
    me = Process.current()
    assert me.alive() and Process.of(me.record()) == me
    for other in ({"start": me.start - 1}, {"host": "elsewhere"}, {"space": "another container"}):
        assert not replace(me, **other).alive()


def test_a_process_that_died_and_was_not_reaped_is_gone() -> None:
    child = subprocess.Popen(["sleep", "600"])
    words = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    there = replace(Process.current(), pid=child.pid, start=int(words[19]))
    assert there.alive()
    child.kill()
    until(lambda: not there.alive(), 5)
    child.wait()


def test_the_next_start_takes_a_run_over_from_a_watcher_that_has_not_acted_yet(storage: Path) -> None:
    owner = Owner(storage)
    owner.wait_ready()
    owner.kill()
    tracker = open_run(recipe(), {}, storage=storage)
    until(lambda: len(watchers(owner.folder)) == 1)
    client = on_sqlite(storage)
    until(lambda: client.get_run(tracker.handle.run_id or "").info.status == "RUNNING")
    tracker.finish("FINISHED")
    found = states(client, owner.folder)
    assert found == {"parent": "FINISHED", "stage": "FINISHED", "attempt": "FAILED"}


def test_whoever_looks_later_ends_a_run_that_lost_its_watcher_too(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner(storage)
    owner.wait_ready()
    assert repair(owner.folder) is None  # it lives
    for pid in watchers(owner.folder):
        psutil.Process(pid).kill()
    owner.kill()
    assert repair(owner.folder) is None  # a watcher may be at work
    for file in owner.folder.iterdir():
        os.utime(file, (time.time() - 60,) * 2)
    assert repair(owner.folder) == "FAILED"
    assert states(on_sqlite(storage), owner.folder) == all_are("FAILED")
    assert repair(owner.folder) is None


def test_a_run_of_another_machine_is_left_alone_until_it_was_silent_for_long(storage: Path) -> None:
    tracker = open_run(recipe(), {}, storage=storage)
    folder = tracker.handle.run_folder
    update_state(folder, owner=Process("elsewhere", 1, 1).record())
    os.utime(folder / "mlflow.json", (time.time() - 600,) * 2)
    (folder / "progress.json").write_text("{}")
    assert repair(folder) is None
    for file in folder.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    assert repair(folder) == "FAILED"


@pytest.mark.slow
def test_a_server_that_is_away_when_the_owner_dies_hears_of_it_when_it_is_back(storage: Path, server: Server) -> None:
    server.start()
    owner = Owner(storage, server.uri)
    owner.wait_ready()
    until(lambda: read_state(owner.folder).get("run_id"))
    server.kill()
    owner.kill()
    until((owner.folder / "mlflow-watcher.log").exists, 120)
    assert "could not be ended" in (owner.folder / "mlflow-watcher.log").read_text()
    server.start()
    began = time.monotonic()
    until(lambda: read_state(owner.folder)["closed"], 120)
    print(f"settled {time.monotonic() - began:.1f} s after the server was back")
    client = MlflowClient(server.uri)
    assert states(client, owner.folder) == all_are("FAILED")
    assert points(client, read_state(owner.folder)["run_id"]) == [(step, float(step)) for step in range(1, 6)]
