"""Finding and stopping heads, on processes that stand in for Ray's."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from echox.errors import LaunchError
from launch.client import local_head

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def sleeper(mark: str) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A process with two children, one of them in its own session."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], env={**os.environ, local_head.MARK: mark}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process, [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def head_of(process: subprocess.Popen[bytes], mark: str, folder: Path) -> local_head.Head:
    me = psutil.Process()
    return local_head.Head(
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
        mark=mark,
        address="http://127.0.0.1:9",
        token_file=str(folder / "token"),
        folder=str(folder),
        starter=me.pid,
        starter_created=me.create_time(),
    )


def test_stopping_ends_the_whole_tree_and_nothing_else(tmp_path: Path) -> None:
    ours, tree = sleeper("ours")
    foreign, foreign_tree = sleeper("foreign")
    folder = tmp_path / "ray"
    folder.mkdir()
    registry = tmp_path / "head.json"
    head = head_of(ours, "ours", folder)
    registry.write_text(json.dumps(asdict(head)))
    try:
        assert {process.pid for process in local_head.processes_of(head)} == {process.pid for process in tree}
        # The parent dies first: its orphans are still known by their mark.
        ours.kill()
        ours.wait()
        assert len(local_head.processes_of(head)) == 2
        local_head.stop_head(head, registry)
        assert not any(process.is_running() and process.status() != "zombie" for process in tree)
        assert all(process.is_running() for process in foreign_tree)
        assert not folder.exists() and not registry.exists()
    finally:
        for process in foreign_tree:
            process.kill()
        foreign.wait()


def test_a_recycled_pid_is_not_our_head(tmp_path: Path) -> None:
    process, tree = sleeper("recycled")
    try:
        head = head_of(process, "recycled", tmp_path)
        assert head.alive() and not head.abandoned()
        assert not replace(head, created=head.created - 60).alive()
        assert replace(head, starter_created=head.starter_created - 60).abandoned()
    finally:
        for member in tree:
            member.kill()
        process.wait()
    assert not head.alive()


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_refused_when_asked_for_and_skipped_otherwise(listener: int) -> None:
    assert not local_head.port_free(listener)
    assert local_head.next_free(listener) > listener
    with pytest.raises(LaunchError, match=f"port {listener} is already in use"):
        local_head.start_head(cpus=1, dashboard_port=listener)
    with pytest.raises(LaunchError, match="all in use"):
        local_head.next_free(listener, count=1)


def test_an_address_that_is_named_must_answer(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(LaunchError, match="RAY_ADDRESS"):
        local_head.running_elsewhere()


class _Api(http.server.BaseHTTPRequestHandler):
    version = "0"

    def do_GET(self) -> None:
        body = json.dumps({"ray_version": self.version}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_foreign_head_is_used_only_with_our_ray_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(local_head, "DASHBOARD_PORT", server.server_port)
        assert local_head.running_elsewhere() is None
        monkeypatch.setattr(_Api, "version", ray.__version__)
        assert local_head.running_elsewhere() == f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    assert local_head.running_elsewhere() is None


def test_a_damaged_registry_means_no_head(tmp_path: Path) -> None:
    registry = tmp_path / "head.json"
    assert local_head.remembered(registry) is None
    registry.write_text('{"pid": 1')
    assert local_head.remembered(registry) is None
    registry.write_text('{"pid": 1, "unknown": 2}')
    assert local_head.remembered(registry) is None


def test_what_a_shared_cache_remembers_counts_only_if_we_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_head, "answers", lambda address: True)
    registry, folder = tmp_path / "head.json", tmp_path / f"{local_head.FOLDER_PREFIX}x"
    folder.mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / f"{local_head.FOLDER_PREFIX}link").symlink_to(tmp_path / "home")
    process, tree = sleeper("ours")
    try:
        head = head_of(process, "ours", folder)
        planted = {
            "another process": replace(head, pid=os.getpid(), created=psutil.Process().create_time()),
            "another mark": replace(head, mark="theirs"),
            "no mark": replace(head, mark=""),
            "another folder": replace(head, folder=str(tmp_path / "home")),
            "a link": replace(head, folder=str(tmp_path / f"{local_head.FOLDER_PREFIX}link")),
            "no folder": replace(head, folder=str(tmp_path / f"{local_head.FOLDER_PREFIX}gone")),
        }
        for what, each in planted.items():
            registry.write_text(json.dumps(asdict(each)))
            assert local_head.remembered(registry) is None, what
        registry.write_text(json.dumps(asdict(head)))
        assert local_head.remembered(registry) == head
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert local_head.remembered(registry) is None, "another user's"
    finally:
        for member in tree:
            member.kill()
        process.wait()
