"""A run on two real Ray nodes, seen from outside: Prometheus endpoints, the head's webhook, each node's network."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from test_ray import STAND_INS

from launch.client import local_head
from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs
from launch.client.local_node import LocalNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "s3cr3t-9f"
DASHBOARD = Path(__file__).resolve().parents[2] / "launch" / "deploy" / "grafana.json"
REPORTED_S = 90
"""Ray's processes hand on their metrics every ten seconds, and its agent collects them."""
HEAD = {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "NCCL_IB_TIMEOUT": "22"}
NODE = {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "TRACE"}
JOB = {"NCCL_DEBUG": "VERSION"}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        messages: list[Any] = self.server.messages  # type: ignore[attr-defined]
        messages.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.messages = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def jobs(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Jobs]:
    """A head with a webhook and network settings, and a node with others; what submits jobs to them has none."""
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    own = {**HEAD, "ECHOX_WEBHOOK": f"http://127.0.0.1:{server.server_port}/{SECRET}"}
    for name in os.environ.keys() & {*HEAD, *NODE, *JOB}:
        monkeypatch.delenv(name)
    with pytest.MonkeyPatch.context() as heads:
        for name, value in own.items():
            heads.setenv(name, value)
        head = local_head.start_head(cpus=1)
    try:
        for name, value in head.environment().items():
            monkeypatch.setenv(name, value)
        node = LocalNode(head, around=["env", *(f"{name}={value}" for name, value in NODE.items())])
        try:
            yield Jobs()
        finally:
            node.kill()
    finally:
        local_head.stop_head(head)


def samples(ports: list[int]) -> dict[str, dict[str, float]]:
    """Name to labels, as they are written, to value."""
    found: dict[str, dict[str, float]] = {}
    pages = [requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text for port in ports]
    for line in "\n".join(pages).splitlines():
        if match := re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line):
            found.setdefault(match[1], {})[match[2]] = float(match[3])
    return found


def test_a_run_is_seen_on_rays_endpoint_and_its_end_is_told(jobs: Jobs, server: Any, tmp_path: Path) -> None:
    run = tmp_path / "watched"
    job = jobs.submit(
        "demo/s2t",
        [f"storage={tmp_path}", "name=watched"],
        environment=JobEnvironment(variables={"PYTHONPATH": STAND_INS, "ECHOX_AUTOSCALED": "1", **JOB}),
        extra_arguments=["--train", "stand_ins:train_watched", "--setup", "stand_ins:setup"],
        stop_wait_s=30,
    )
    deadline = time.monotonic() + 300
    while not (run / "nodes.json").exists():
        assert time.monotonic() < deadline and jobs.status(job) in ("PENDING", "RUNNING"), jobs.logs(job)
        time.sleep(0.2)
    time.sleep(0.2)
    ports = [node["MetricsExportPort"] for node in json.loads((run / "nodes.json").read_text())]
    assert len(ports) == 2
    expected = {"attempt": 3, "step": 41, "loss": 1.25, "step_ms": 800, "bad_steps": 2, "save_s": 6.5,
                "save_blocked_ms": 30}  # fmt: skip
    deadline = time.monotonic() + REPORTED_S
    found: dict[str, dict[str, float]] = {}
    while not all(f"ray_echox_{name}" in found for name in expected):
        assert time.monotonic() < deadline, sorted(found)
        time.sleep(1)
        found = samples(ports)
    for name, value in expected.items():
        ((labels, shown),) = found[f"ray_echox_{name}"].items()
        assert shown == value and 'run="watched"' in labels and 'stage="s2t"' in labels
    drawn = set(re.findall(r"\bray_(?!echox)\w+", DASHBOARD.read_text(encoding="utf-8")))
    assert {name for name in drawn if not re.search("_gpus?_|_gram_", name)} <= found.keys()

    network = {rank["NCCL_SOCKET_IFNAME"]: rank for rank in json.loads((run / "network.json").read_text())}
    assert network == {"eth0": {**HEAD, **JOB}, "ib0": {**HEAD, **NODE, **JOB}}
    (run / "seen").touch()
    assert jobs.wait(job) == "SUCCEEDED", jobs.logs(job)
    ((path, message),) = server.messages
    assert path == f"/{SECRET}" and message["run"] == "watched" and message["status"] == "finished"
    assert message["step"] == 41 and SECRET not in jobs.logs(job)
    assert SECRET not in "".join(file.read_text(errors="replace") for file in run.rglob("*") if file.is_file())
