"""What the tests of tracking share: recipes, a real MLflow server, real owner processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from mlflow.tracking import MlflowClient

from echox.tracking.spool import Spool, pending
from echox.tracking.state import SPOOL_FOLDER

ROOT = Path(__file__).resolve().parents[2]
DEAD = "http://127.0.0.1:9"


def recipe(
    name: str = "tiny-s2t", stage: str = "s2t", uri: str | None = None, hours: float = 0.1, parent: str = "tiny"
) -> Any:
    tracking = SimpleNamespace(uri=uri, experiment="tests", parent_run=parent, system_metrics=True, deliver_hours=hours)
    return SimpleNamespace(name=name, stage=stage, scale="tiny", storage="runs", tracking=tracking)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for a condition; its value, or a failure that says it never came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {condition}")


class Threads:
    """The threads that ask a server or write a journal from now on: those that wait where one of them is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asking = self._of(monkeypatch, requests.Session, "send")
        self.writing = self._of(monkeypatch, Spool, "append")

    def waits(self) -> bool:
        """Whether the caller's thread is one of them."""
        return threading.current_thread() in self.asking | self.writing

    @staticmethod
    def _of(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> set[threading.Thread]:
        seen: set[threading.Thread] = set()
        method = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            seen.add(threading.current_thread())
            return method(*args, **options)

        monkeypatch.setattr(owner, name, call)
        return seen


def on_sqlite(storage: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def children(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """The child runs by name."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.info.run_name: run for run in found}


def points(client: MlflowClient, run_id: str, key: str = "loss/total") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real `mlflow server` over SQLite on loopback that can be killed and started again.

    Args:
        folder: of its files.
        password: of the user `admin`, without whose login nothing is answered; none asks for no login.
    """

    def __init__(self, folder: Path, password: str = "") -> None:
        self._folder = folder
        self._password = password
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        words += ["--artifacts-destination", str(self._folder / "served")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self._password:
            words += ["--app-name", "basic-auth"]
            environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "x", "MLFLOW_AUTH_CONFIG_PATH": str(self._users())}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        until(self._answers, 300)

    def _users(self) -> Path:
        file = self._folder / "auth.ini"
        rule = "authorization_function = mlflow.server.auth:authenticate_request_basic_auth"
        known = f"admin_username = admin\nadmin_password = {self._password}\ndefault_permission = READ"
        file.write_text(f"[mlflow]\ndatabase_uri = sqlite:///{self._folder}/users.db\n{known}\n{rule}\n")
        return file

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, (self._folder / "server.log").read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


OWNER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tracking.parts import recipe
from echox.tracking.run import open_run

storage, uri = Path(sys.argv[1]), sys.argv[2] or None
tracker = open_run(recipe(uri=uri), {{"lr": 1}}, storage=storage)
tracker.begin_attempt(1, 0, {{"hosts": "here"}})
for step in range(1, 6):
    tracker.log_metrics({{"loss/total": float(step)}}, step)
{then}
"""


class Owner:
    """A process that opens a run, begins an attempt, logs five steps, and does what the test wants then."""

    def __init__(self, storage: Path, uri: str = "", then: str = "print('ready', flush=True); time.sleep(600)") -> None:
        words = [sys.executable, "-c", OWNER.format(root=str(ROOT), then=then), str(storage), uri]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.folder = storage / "tiny-s2t"

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        until(lambda: sum(path.read_text().count("loss/total") for path in pending(self.folder / SPOOL_FOLDER)) == 5)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def watchers(run_folder: Path) -> list[int]:
    """Process ids of the watchers of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"echox.tracking.watcher" in words and str(run_folder).encode() in words:
            found.append(int(entry.name))
    return found
