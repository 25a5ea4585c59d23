"""The launch path on a real Ray head: two workers, the job API, token authentication, errors, stop and clean-up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from mlflow.tracking import MlflowClient

from echox.cli import main
from echox.errors import LaunchError, RecipeError
from echox.speak.vocoder import load_vocoder
from launch.client import local_head
from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs
from launch.client.status import error_report, run_status
from launch.events import read_events
from launch.sweep.runner import Sweep
from launch.sweep.trials import space
from tests.evaluate.benchmarks.world import command, stand_in, write_world
from tests.vocoder import toy

pytestmark = pytest.mark.timeout(600)

RECIPE = "demo/s2t"
STAND_INS = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def head(patched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_head.Head]:
    folder = tmp_path_factory.mktemp("cluster")
    patched.setenv("ECHOX_CACHE", str(folder / "cache"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        patched.delenv(name, raising=False)
    head = local_head.start_head(cpus=2)
    try:
        yield head
    finally:
        stragglers = local_head.processes_of(head)
        local_head.stop_head(head)
        assert stragglers and not any(process.is_running() for process in stragglers)
        assert local_head.processes_of(head) == [] and not Path(head.folder).exists()
        assert local_head.remembered() is None


@pytest.fixture(scope="module")
def jobs(head: local_head.Head, patched: pytest.MonkeyPatch) -> Jobs:
    assert local_head.remembered() == head
    with pytest.raises(LaunchError) as refused:
        Jobs(head.address)
    assert "401" in str(refused.value) and "RAY_AUTH_TOKEN" in str(refused.value)
    for name, value in head.environment().items():
        patched.setenv(name, value)
    return Jobs()


def test_the_doctor_asks_the_nodes(jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cluster", "--storage", str(tmp_path / "runs"), "--model", "no/model"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ok    ") and "no GPU" in said[0] and f"ray {ray.__version__}" in said[0]
    assert said[-1] == "1 nodes, 0 problems" and list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").touch()
    assert main(["doctor", "--cluster", "--storage", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith(f"nothing can be written to {tmp_path / 'file'}: File exists")
    assert said[-1] == "1 nodes, 1 problems"


def submit(jobs: Jobs, storage: Path, train: str, *overrides: str) -> str:
    return jobs.submit(
        RECIPE,
        [f"storage={storage}", f"name={train}", *overrides],
        environment=JobEnvironment(variables={"PYTHONPATH": STAND_INS}),
        extra_arguments=["--train", f"stand_ins:{train}", "--setup", "stand_ins:setup"],
        stop_wait_s=30,
    )


def run_of(storage: Path, name: str) -> Any:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return client.get_run(json.loads((storage / name / "mlflow.json").read_text())["run_id"])


@pytest.mark.slow
def test_a_vocoder_is_trained_by_two_workers(jobs: Jobs, tmp_path: Path) -> None:
    voice = toy.write_voice(tmp_path / "voice")
    changes = [f"storage={tmp_path / 'runs'}", "name=voice", f"data.train=[{voice}]", f"data.valid={voice}"]
    changes += ["data.micro_batch=2", "data.segment_frames=8", "generator.channels=32", "discriminators.channels=16"]
    changes += ["scaling.workers=2", "optim.steps=2", "sample_every=1", "samples=1", "checkpoint_every=0"]
    job = jobs.submit("launch/vocoders/demo.yaml", changes, stop_wait_s=30)
    assert job == "voice-a1" and jobs.wait(job) == "SUCCEEDED", jobs.logs(job)
    run = tmp_path / "runs" / "voice"
    assert progress(run) == {**progress(run), "stage": "vocoder", "step": 2, "state": "finished"}
    assert load_vocoder(run / "vocoder")([np.array([1, 2, 3], np.uint16)])[0].size >= 3 * 320
    starts = [event for event in read_events(run) if event["event"] == "start" and "world_size" in event]
    assert [event["world_size"] for event in starts] == [2, 2]
    found = run_of(tmp_path / "runs", "voice")
    assert found.info.status == "FINISHED" and found.data.metrics["valid/loss/mel_l1"] > 0
    kept = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").list_artifacts(found.info.run_id, "samples")
    assert [Path(each.path).name for each in kept] == ["real-00.wav", "samples.html", "step-00000001", "step-00000002"]


def names(processes: list[psutil.Process]) -> str:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()
    return " ".join(found)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def progress(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "progress.json").read_text()))
    except FileNotFoundError:
        return {}


def wait(jobs: Jobs, job: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline and jobs.status(job) in ("PENDING", "RUNNING"), jobs.logs(job)
        time.sleep(0.1)


def test_a_killed_worker_is_replaced_and_a_stopped_job_saves_first(
    jobs: Jobs, head: local_head.Head, storage: Path
) -> None:
    name = "train_steps"
    run = storage / name
    job = submit(jobs, storage, name, "optim.steps=19610", "engine.checkpoint_every=10", "scaling.max_failures=1")
    with pytest.raises(LaunchError, match="already has job"):
        submit(jobs, storage, name)
    wait(jobs, job, lambda: progress(run).get("step", 0) > 10)
    assert "AutoscalingCoordinator" not in names(local_head.processes_of(head)), "a fixed count asks no autoscaler"
    first = json.loads((run / "pids.json").read_text())
    os.kill(first["pids"][1], signal.SIGKILL)
    wait(jobs, job, lambda: progress(run)["attempt"] == 2 and progress(run)["state"] == "training")
    second = json.loads((run / "pids.json").read_text())
    assert second["first"] >= 10 and second["first"] % 10 == 0
    known = run_status(run)
    assert known["attempt"] == 2 and "worker 1 was lost" in known["failure"]["error"]
    assert known["failure"]["decision"] == "again, 0 left"
    assert error_report(read_events(run))[0].startswith("attempt 1, cause: rank 1: worker 1 was lost")

    assert jobs.find(name) == job
    assert jobs.stop(job) == "STOPPED"
    ended = progress(run)
    assert ended["state"] == "stopped"
    saved = json.loads((run / "checkpoints" / f"step-{ended['step']:08d}" / "manifest.json").read_text())
    assert saved == {"step": ended["step"], "world": 2}
    assert "event=job_stopped" in jobs.logs(job) and "status=KILLED" in jobs.logs(job)
    stopped = run_of(storage, name)
    assert stopped.info.status == "KILLED" and stopped.data.tags["stopped"] == "SIGTERM"
    assert stopped.data.params["optim.steps"] == "19610"
    deadline = time.monotonic() + 60
    while "RayTrainWorker" in names(local_head.processes_of(head)):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_two_workers_get_what_they_need(jobs: Jobs, storage: Path) -> None:
    name = "train"
    job = submit(jobs, storage, name, "optim.steps=1961")
    assert jobs.wait(job) == "SUCCEEDED", jobs.logs(job)
    seen = json.loads((storage / name / "seen.json").read_text())
    assert seen["total"] == 3.0 and seen["world"] == 2 and seen["setup"] == "s2t 0/2"
    assert seen["accelerator"] == "cpu" and seen["nccl"] == "3" and seen["threads"] == "1"
    assert seen["cache"] == os.environ["ECHOX_CACHE"] and seen["checkpoint_in"] == "None"
    assert seen["steps"] == 1961 and "_ray_pkg_" in seen["cwd"]
    assert seen["options"] == {"accept_new_data": False, "allow": []}
    done = run_of(storage, name)
    assert done.info.status == "FINISHED" and done.data.metrics["loss/total"] == 3.0
    assert {"stage": "s2t", "scale": "demo", "recipe": "demo/s2t"}.items() <= done.data.tags.items()
    pointers = list((storage / name / "ray" / "attempt-1").glob("checkpoint_*/checkpoint.json"))
    assert [json.loads(path.read_text())["path"] for path in pointers] == [
        str(storage / name / "checkpoints" / "step-00000001")
    ]


@pytest.mark.slow
def test_a_sweep_trains_its_trials_as_jobs_of_one_parent_run(jobs: Jobs, storage: Path) -> None:
    class Stood:
        """The cluster, whose jobs get the stand-in for the engine."""

        list, stop, failure = jobs.list, jobs.stop, jobs.failure

        def submit(self, recipe: str, overrides: Sequence[str] = ()) -> str:
            words = [word for word in overrides if not word.startswith("name=")]
            name = next(word for word in overrides if word.startswith("name="))
            return submit(jobs, storage, "train", *words, name)

    swept = space(["optim.steps=1961,1962,1963", "tracking.system_metrics=false", f"storage={storage}"])
    outcomes = Sweep(
        recipe=RECIPE,
        trials=swept.trials("swept", None, 0),
        queue=Stood(),
        storage=storage,
        record=storage / "swept-sweep.json",
        metric="loss/total",
        rule=None,
        parallel=1,
        say=print,
    ).run()
    assert [outcome.state for outcome in outcomes] == ["done"] * 3
    for outcome in outcomes:
        seen = json.loads((storage / outcome.trial.name / "seen.json").read_text())
        assert str(seen["steps"]) == outcome.trial.values["optim.steps"]
    runs = [run_of(storage, outcome.trial.name) for outcome in outcomes]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(parent).info.run_name == "swept-sweep"


@pytest.mark.slow
def test_a_killed_driver_comes_back_and_validation_stops_too(jobs: Jobs, storage: Path) -> None:
    name = "driver"
    run = storage / name
    more = ("optim.steps=19610", "engine.checkpoint_every=10", "scaling.max_failures=1", "engine.validate_every=400")
    job = submit(jobs, storage, "train_steps", *more, f"name={name}")
    wait(jobs, job, lambda: progress(run).get("step", 0) > 10)
    started = [event for event in read_events(run) if event["event"] == "job_start"]
    os.kill(started[-1]["pid"], signal.SIGKILL)
    wait(jobs, job, lambda: progress(run)["attempt"] == 2 and progress(run)["state"] == "training")
    assert json.loads((run / "pids.json").read_text())["first"] >= 10
    assert run_status(run)["failure"]["error"] == "the driver was killed by SIGKILL"
    wait(jobs, job, lambda: progress(run)["state"] == "validating")
    assert jobs.stop(job) == "STOPPED"
    assert progress(run)["state"] == "stopped" and progress(run)["step"] == 400
    assert (run / "checkpoints" / "step-00000400" / "manifest.json").exists()
    assert run_of(storage, name).info.status == "KILLED"


@pytest.mark.slow
def test_a_job_stopped_while_it_starts_ends_at_once(jobs: Jobs, storage: Path) -> None:
    name = "starting"
    job = submit(jobs, storage, "train_steps", f"name={name}")
    wait(jobs, job, lambda: any(event["event"] == "job_start" for event in read_events(storage / name)))
    began = time.monotonic()
    assert jobs.stop(job) == "STOPPED"
    assert time.monotonic() - began < 15
    assert "there was nothing to save" in jobs.logs(job)
    assert run_of(storage, name).info.status == "KILLED"


@pytest.mark.slow
def test_a_workers_error_is_one_sentence_and_the_exit_code(jobs: Jobs, storage: Path) -> None:
    job = submit(jobs, storage, "train_bad_data")
    assert jobs.wait(job) == "FAILED"
    text = jobs.logs(job)
    assert "Traceback" not in text
    assert jobs.failure(job) == ("shard-000000.tar ends in the middle of a sample [sqa-train]. Fix: build it again")
    assert next(entry for entry in jobs.list() if entry["id"] == job)["exit_code"] == 4
    assert run_of(storage, "train_bad_data").info.status == "FAILED"


@pytest.mark.slow
def test_ray_job_submit_by_hand_needs_no_wrapper(jobs: Jobs, storage: Path) -> None:
    root = Path(__file__).parents[2]
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": STAND_INS}})
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--runtime-env-json"),
        *(runtime_env, "--", "python", "-m", "launch.train", "demo/s2t", f"storage={storage}", "name=by-hand"),
        *("--train", "stand_ins:train", "--setup", "stand_ins:setup"),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event=job_end run=by-hand" in done.stdout and "status=FINISHED" in done.stdout
    assert json.loads((storage / "by-hand" / "seen.json").read_text())["total"] == 3.0
    assert run_of(storage, "by-hand").info.status == "FINISHED"


def test_a_wrong_recipe_is_refused_before_submission(jobs: Jobs) -> None:
    before = len(jobs.list())
    with pytest.raises(RecipeError, match="optim.stepz"):
        jobs.submit(RECIPE, ["optim.stepz=3"])
    assert len(jobs.list()) == before


def test_a_taken_port_is_one_clear_sentence(head: local_head.Head) -> None:
    port = int(head.address.rsplit(":", 1)[1])
    with pytest.raises(LaunchError, match=f"port {port} is already in use"):
        local_head.start_head(cpus=1, dashboard_port=port)


@pytest.mark.slow
def test_benchmarks_are_answered_by_processes_of_which_one_is_lost(jobs: Jobs, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        world = write_world(tmp_path / "world")
        assert main(command(world, tmp_path / "alone")) == 0
    begun, root = tmp_path / "begun", Path(__file__).parents[2]
    words = [word for word in command(world, tmp_path / "shared") if word != "evaluate"]
    environment = JobEnvironment(variables={"PYTHONPATH": str(root), "ECHOX_TEST_LOG": str(begun)})
    job = jobs.submit_module(["tests.launch.scored", *words, "--workers", "2"], "scored", environment, {})
    assert jobs.wait(job) == "SUCCEEDED", jobs.logs(job)
    assert sorted(begun.read_text().split()) == ["0/2", "1/2", "1/2"], "the second was lost once"
    alone, shared = (
        (tmp_path / name / "benchmarks" / "results.json").read_text().replace(str(tmp_path / name), "")
        for name in ("alone", "shared")
    )
    assert alone == shared
    said = jobs.logs(job).splitlines()
    assert said.count(str(tmp_path / "shared" / "benchmarks" / "benchmark.html")) == 1, "scores are printed once"
