"""The head of the cluster is lost in mid-run and another one started: `--retries` brings the run back from its save."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_ray import STAND_INS, progress

from launch.client import local_head
from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs
from launch.client.resubmit import submit_and_follow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DAEMONS = ("gcs_server", "raylet")


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def kill_daemons(head: local_head.Head) -> None:
    """What a crash of the head's machine takes first; job and workers are left to find out."""
    for process in local_head.processes_of(head):
        with contextlib.suppress(psutil.NoSuchProcess):
            if Path((process.cmdline() or [""])[0]).name in DAEMONS:
                process.kill()


def test_a_restarted_head_gets_the_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    run, said, states = tmp_path / "kept", list[str](), list[str]()

    def submit(jobs: Jobs) -> str:
        return jobs.submit(
            "demo/s2t",
            [f"storage={tmp_path}", "name=kept", "optim.steps=19610", "engine.checkpoint_every=10"],
            environment=JobEnvironment(variables={"PYTHONPATH": STAND_INS}),
            extra_arguments=["--train", "stand_ins:train_steps", "--setup", "stand_ins:setup"],
            stop_wait_s=30,
        )

    def follow() -> None:
        states.append(submit_and_follow(Jobs, submit, retries=1, write=said.append))

    heads = [local_head.start_head(cpus=2)]
    try:
        for name, value in heads[0].environment().items():
            monkeypatch.setenv(name, value)
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        wait(lambda: progress(run).get("step", 0) > 10)
        lost = progress(run)["step"]
        kill_daemons(heads[0])
        wait(lambda: not heads[0].alive())
        heads.append(local_head.start_head(cpus=2))
        for name, value in heads[1].environment().items():
            monkeypatch.setenv(name, value)
        wait(lambda: progress(run)["attempt"] > 1 and progress(run)["state"] == "training")
        assert progress(run)["step"] >= lost - lost % 10 - 10
        jobs = Jobs()
        job = jobs.find("kept")
        assert job is not None and jobs.stop(job) == "STOPPED"
        follower.join(60)
        assert states == ["STOPPED"] and progress(run)["state"] == "stopped"
        assert any("submitting the run again, 0 retries left" in line for line in said)
        assert not [p for p in local_head.processes_of(heads[0]) if p.is_running()], "the old head's processes live on"
    finally:
        for head in heads:
            local_head.stop_head(head)
