"""Two nodes that share no folder: a run on real Ray Train in a real S3 server and a real MLflow server, a node lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from test_ray import STAND_INS, wait

from echox.cli import main
from echox.engine.object_store.run_store import RunStore
from echox.stream.format.writer import write_shards
from launch.client import local_head
from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs
from launch.client.local_node import LocalNode
from tests.s3 import serve_s3
from tests.tracking.parts import Server, points

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ENGINE = Path(__file__).parents[1] / "engine"
STEPS = 120
OTHER_IP = "127.0.0.2"
"""Of the second node: at one address, Ray would number the workers of both nodes as those of one."""


@pytest.fixture
def bucket() -> Iterator[str]:
    """Its variables are in the environment that nodes and jobs start with, as those of an instance are."""
    with serve_s3("runs-of-all") as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield "s3://runs-of-all"


@pytest.fixture
def head(bucket: str, tmp_path: Path) -> Iterator[local_head.Head]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        head = local_head.start_head(cpus=1)
        for name, value in head.environment().items():
            patch.setenv(name, value)
        try:
            yield head
        finally:
            local_head.stop_head(head)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


def recipe(folder: Path, bucket: str, uri: str) -> Path:
    """Stage II of a tiny model on shards of this folder."""
    sys.path.insert(0, str(ENGINE))
    from chaos import sample, scenario
    from launching import prepare
    from toy import toy_recipe

    prepare(folder)
    write_shards(folder / "train", map(sample, range(50)), per_shard=7)
    write_shards(folder / "valid", map(sample, range(100, 108)), per_shard=3)
    changes = {
        **scenario(folder, "stored", STEPS)["recipe"],
        "engine__checkpoint_every": 10,
        "storage": f"{bucket}/runs",
        "tracking__uri": uri,
        "tracking__system_metrics": False,
        "scaling": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1, "max_failures": 1},
    }
    made = toy_recipe("stored", folder / "ds.json", **changes)
    (folder / "stored.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return folder / "stored.yaml"


def test_a_run_without_a_shared_folder_outlives_a_node(
    head: local_head.Head, bucket: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = os.environ["ECHOX_CACHE"]
    alone = f'hostname node-b && mount -t tmpfs none {cache} && exec "$@"'
    around = ["unshare", "--mount", "--uts", "sh", "-c", alone, "sh"]
    if subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    url, jobs, store = f"{bucket}/runs/stored", Jobs(), RunStore(f"{bucket}/runs/stored")

    def progress() -> dict[str, object]:
        return dict(json.loads(store.read("progress.json") or b"{}"))

    node = LocalNode(head, around=around, ip=OTHER_IP)
    try:
        job = jobs.submit(
            str(recipe(tmp_path, bucket, server.uri)),
            [],
            environment=JobEnvironment(
                variables={
                    "PYTHONPATH": os.pathsep.join([STAND_INS, str(ENGINE), str(ENGINE.parents[1])]),
                    "TOY_FROZEN": str(tmp_path / "frozen"),
                    "ECHOX_AUTOSCALED": "1",
                }
            ),
            extra_arguments=["--setup", "stand_ins:tiny_setup"],
            stop_wait_s=30,
        )
        wait(jobs, job, lambda: int(str(progress().get("step", 0))) > 25)
        node.kill()
        node = LocalNode(head, around=around, ip=OTHER_IP)  # with an empty disk
        wait(jobs, job, lambda: progress().get("attempt") == 2 and progress().get("state") == "training")
        deadline = time.monotonic() + 400
        while (status := jobs.status(job)) != "SUCCEEDED":
            assert time.monotonic() < deadline and status in ("PENDING", "RUNNING"), jobs.logs(job)
            time.sleep(0.5)
    finally:
        node.kill()
    assert main(["checkpoint", "verify", url, "--json"]) == 0
    assert f"step-{STEPS:08d}" in json.loads(capsys.readouterr().out)
    assert main(["status", url]) == 0
    said = capsys.readouterr().out
    assert f"{STEPS}/{STEPS}" in said and "finished, attempt 2" in said and "again, 0 left" in said
    assert main(["logs", url, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resuming" and event["rank"] == 0]
    assert resumed["step"] >= 10 and resumed["step"] % 10 == 0
    assert {len(event["hosts"]) for event in events if event["event"] == "start_check"} == {2}
    assert {event["rank"] for event in events} == {0, 1, "driver"}
    assert any(event["event"] == "job_end" for event in events)
    client = MlflowClient(server.uri)
    run = client.get_run(json.loads(store.read("mlflow.json") or b"{}")["run_id"])
    assert run.info.status == "FINISHED"
    assert [step for step, _ in points(client, run.info.run_id)] == list(range(1, STEPS + 1))
