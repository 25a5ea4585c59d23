"""A head ends with the process that started it, however that ends; on stand-ins for Ray's processes, and on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from launch.client import local_head

FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""
STARTER = f"""
import json, os, subprocess, sys
from dataclasses import asdict
from pathlib import Path
import psutil
from launch.client import local_head

folder, registry = Path(sys.argv[1]), Path(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c", {FAMILY!r}], env={{**os.environ, local_head.MARK: "ours"}},
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
me, head = psutil.Process(), psutil.Process(child.pid)
head = local_head.Head(pid=child.pid, created=head.create_time(), mark="ours", address="http://127.0.0.1:9",
                       token_file="token", folder=str(folder), starter=me.pid, starter_created=me.create_time())
registry.write_text(json.dumps(asdict(head)))
local_head.start_guard(head, registry)
print(json.dumps(asdict(head)), flush=True)
if sys.stdin.readline() == "stop\\n":
    local_head.STOP_S = 0.5
    local_head.stop_head(head, registry)
    sys.stdin.readline()
"""
REAL = """
import json, sys, time
from dataclasses import asdict
from launch.client import local_head
print(json.dumps(asdict(local_head.start_head(cpus=1))), flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def guards(mark: str) -> list[int]:
    """Process ids of the guards of a head."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "launch.client.head_guard" in words and any(mark in word for word in words):
            found.append(process.pid)
    return found


def begin(code: str, *words: str) -> tuple[subprocess.Popen[str], local_head.Head]:
    starter = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert starter.stdout is not None
    return starter, local_head.Head(**json.loads(starter.stdout.readline()))


@pytest.fixture
def bystanders() -> Iterator[list[psutil.Process]]:
    """A family of another head."""
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY], env={**os.environ, local_head.MARK: "theirs"}, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    root = psutil.Process(parent.pid)
    family = [root, *root.children(recursive=True)]
    yield family
    for process in family:
        process.kill()
    parent.wait()


@pytest.mark.parametrize("end", ["killed", "killed with its session", "stopped"])
def test_no_head_outlives_its_starter(tmp_path: Path, bystanders: list[psutil.Process], end: str) -> None:
    folder, registry = tmp_path / "ray", tmp_path / "head.json"
    folder.mkdir()
    starter, head = begin(STARTER, str(folder), str(registry))
    try:
        assert len(local_head.processes_of(head)) == 3 and len(guards(str(folder))) == 1
        if end == "stopped":
            assert starter.stdin is not None
            starter.stdin.write("stop\n")
            starter.stdin.flush()
        else:
            (starter.kill if end == "killed" else lambda: os.killpg(starter.pid, signal.SIGKILL))()
            starter.wait()
        until(lambda: not local_head.processes_of(head) and not guards(str(folder)))
        assert (starter.poll() is None) == (end == "stopped"), "the guard leaves with the head, not with the starter"
        assert not folder.exists() and not registry.exists()
        assert all(process.is_running() and process.status() != "zombie" for process in bystanders)
    finally:
        starter.kill()
        local_head.stop_head(head, registry)


def test_the_head_of_a_living_starter_and_what_another_remembers_stay(tmp_path: Path) -> None:
    folder, registry = tmp_path / "ray", tmp_path / "head.json"
    folder.mkdir()
    starter, head = begin(STARTER, str(folder), str(registry))
    try:
        time.sleep(1.5)  # the guard looks twice a second
        assert len(local_head.processes_of(head)) == 3 and guards(str(folder))
        registry.write_text(json.dumps({**asdict(head), "mark": "another"}))
        starter.kill()
        starter.wait()
        until(lambda: not local_head.processes_of(head) and not guards(str(folder)))
        assert registry.exists()
    finally:
        starter.kill()
        local_head.stop_head(head, registry)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_head_ends_when_its_starter_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    starter, head = begin(REAL)
    try:
        assert local_head.remembered() == head and not head.abandoned()
        family = local_head.processes_of(head)
        assert len(family) > 3
        starter.kill()
        starter.wait()
        until(lambda: not local_head.processes_of(head) and not guards(head.folder))
        assert not any(process.is_running() and process.status() != "zombie" for process in family)
        assert local_head.remembered() is None and not Path(head.folder).exists()
    finally:
        starter.kill()
        local_head.stop_head(head)
