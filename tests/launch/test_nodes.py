"""Nodes that come and go: a second raylet of the same head, killed with its worker, on real Ray Train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_ray import STAND_INS, progress, wait

from echox.cli import main
from launch.client import local_head
from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs
from launch.client.local_node import LocalNode
from launch.client.status import run_status
from launch.events import read_events
from launch.job.ray_context import DRAINED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def announce_loss(head: local_head.Head, node: LocalNode) -> None:
    """What a cloud's notice of preemption becomes on the node that it is about: Ray drains it."""
    script = f"""
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from launch.job.notices import drain_this_node
ray.init(address="{node.address}", log_to_driver=False)
others = [each for each in ray.nodes() if each["Alive"] and "node:__internal_head__" not in each["Resources"]]
there = NodeAffinitySchedulingStrategy(others[0]["NodeID"], soft=False)
ray.get(ray.remote(num_cpus=0)(drain_this_node).options(scheduling_strategy=there).remote(120.0))
"""
    environment = {**os.environ, **head.environment(), "RAY_ADDRESS": "", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_head.Head]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOX_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        head = local_head.start_head(cpus=1)
        for name, value in head.environment().items():
            patch.setenv(name, value)
        try:
            yield head
        finally:
            local_head.stop_head(head)


def submit(jobs: Jobs, storage: Path, name: str, *overrides: str) -> str:
    return jobs.submit(
        "demo/s2t",
        [f"storage={storage}", f"name={name}", "optim.steps=19610", "engine.checkpoint_every=10", *overrides],
        environment=JobEnvironment(variables={"PYTHONPATH": STAND_INS, "ECHOX_AUTOSCALED": "1"}),
        extra_arguments=["--train", "stand_ins:train_steps", "--setup", "stand_ins:setup"],
        stop_wait_s=30,
    )


def test_a_node_without_the_shared_storage_is_found(
    head: local_head.Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own host name, and an empty file system where the others have the runs."""
    storage = tmp_path / "shared"
    storage.mkdir()
    alone = f'hostname node-b && mount -t tmpfs none {storage} && exec "$@"'
    around = ["unshare", "--mount", "--uts", "sh", "-c", alone, "sh"]
    if subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    assert main(["doctor", "--cluster", "--storage", str(storage / "runs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    node = LocalNode(head, around=around)
    try:
        deadline = time.monotonic() + 120
        while ("node-b", "ALIVE") not in nodes_of(Jobs()):
            assert time.monotonic() < deadline, nodes_of(Jobs())
            time.sleep(0.3)
        assert main(["doctor", "--cluster", "--storage", str(storage / "runs"), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert len(found["nodes"]) == 2 and len({each["code"] for each in found["nodes"]}) == 1
        (problem,) = found["problems"]
        assert problem.startswith("node-b: what the head writes to ") and "no place that nodes share" in problem
        assert list((storage / "runs").iterdir()) == [], "what was written for the proof is gone"
    finally:
        node.kill()


def nodes_of(jobs: Jobs) -> list[tuple[str, str]]:
    """Host name and state of every node, by the head's word."""
    nodes = jobs._nodes()["data"]["summary"]
    return [(node["raylet"].get("nodeManagerHostname", ""), node["raylet"].get("state", "")) for node in nodes]


def world_of(run: Path) -> int:
    return len(json.loads((run / "pids.json").read_text())["pids"])


def test_a_lost_node_is_waited_for_and_training_goes_on(head: local_head.Head, tmp_path: Path) -> None:
    jobs, node, run = Jobs(), LocalNode(head), tmp_path / "fixed"
    job = submit(jobs, tmp_path, "fixed", "scaling.workers=2", "scaling.max_failures=1")
    try:
        wait(jobs, job, lambda: progress(run).get("step", 0) > 10)
        lost = progress(run)["step"]
        node.kill()
        node = LocalNode(head)
        wait(jobs, job, lambda: progress(run)["attempt"] == 2 and progress(run)["state"] == "training")
        assert world_of(run) == 2 and progress(run)["step"] >= lost - lost % 10 - 10
        known = run_status(run)
        assert known["attempt"] == 2 and known["failure"]["decision"] == "again, 0 left"
        assert jobs.stop(job) == "STOPPED" and progress(run)["state"] == "stopped"
    finally:
        node.kill()


def test_an_elastic_run_goes_on_with_the_nodes_that_are_left_and_grows_again(
    head: local_head.Head, tmp_path: Path
) -> None:
    jobs, node, run = Jobs(), LocalNode(head), tmp_path / "elastic"
    time.sleep(5)  # a node takes a while to be counted, and the run would begin without it
    job = submit(jobs, tmp_path, "elastic", "scaling.workers=[1,2]", "scaling.max_failures=1")
    try:
        wait(jobs, job, lambda: progress(run).get("step", 0) > 10 and world_of(run) == 2)
        node.kill()
        wait(jobs, job, lambda: progress(run)["attempt"] > 1 and progress(run)["state"] == "training")
        assert world_of(run) == 1
        shrunk = progress(run)["attempt"]
        node = LocalNode(head)
        wait(jobs, job, lambda: progress(run)["attempt"] > shrunk and progress(run)["state"] == "training")
        assert world_of(run) == 2
        assert jobs.stop(job) == "STOPPED" and progress(run)["state"] == "stopped"
    finally:
        node.kill()


def test_a_node_that_is_taken_away_with_notice_costs_no_step(head: local_head.Head, tmp_path: Path) -> None:
    jobs, node, run = Jobs(), LocalNode(head), tmp_path / "drained"
    job = submit(jobs, tmp_path, "drained", "scaling.workers=2", "scaling.max_failures=0")
    try:
        wait(jobs, job, lambda: progress(run).get("step", 0) > 10)
        announce_loss(head, node)
        wait(jobs, job, lambda: any(event["event"] == "job_stopped" for event in read_events(run)))
        stopped = next(event for event in read_events(run) if event["event"] == "job_stopped")
        assert stopped["why"].startswith(DRAINED)
        node.kill()
        node = LocalNode(head)
        wait(jobs, job, lambda: progress(run)["attempt"] == 2 and progress(run)["state"] == "training")
        assert json.loads((run / "pids.json").read_text())["first"] == stopped["step"]
        assert run_status(run)["failure"] is None
        assert jobs.stop(job) == "STOPPED" and progress(run)["state"] == "stopped"
    finally:
        node.kill()
