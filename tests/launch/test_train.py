from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from echox.config.load import load_recipe
from echox.errors import DataError, LaunchError
from echox.tracking.client import RunHandle
from launch.train import main, user_error, worker_environment
from launch.worker import error_file


def handle(tmp_path: Path) -> RunHandle:
    return RunHandle(uri="sqlite:///x", run_id=None, parent_id=None, attempt=2, run_folder=tmp_path / "tiny")


class WorkerGroupError(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("Training failed due to worker errors:\n a traceback")
        self.worker_failures = failures


class Wrapped(Exception):
    def __init__(self, inner: BaseException) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self._base_exc = inner


def test_a_users_error_wins_over_the_ranks_that_only_lost_their_peer(tmp_path: Path) -> None:
    cause = DataError("shard-000001.tar is cut short", where="tiny", fix="build it again")
    error = WorkerGroupError({0: Wrapped(RuntimeError("Connection closed by peer")), 1: Wrapped(cause)})
    assert user_error(error, handle(tmp_path)) is cause


def test_a_bug_names_the_file_with_the_traceback(tmp_path: Path) -> None:
    path = error_file(handle(tmp_path), 1)
    path.parent.mkdir(parents=True)
    path.write_text("Traceback ...")
    error = WorkerGroupError({0: RuntimeError("actor died"), 1: Wrapped(ZeroDivisionError("division by zero\nmore"))})
    told = user_error(error, handle(tmp_path))
    assert isinstance(told, LaunchError)
    assert "worker 1 failed: ZeroDivisionError: division by zero" in str(told) and str(path) in str(told)
    assert "\n" not in str(told)


def test_a_killed_worker_and_a_failed_controller_are_told_apart(tmp_path: Path) -> None:
    lost = user_error(WorkerGroupError({3: RuntimeError("The actor died unexpectedly")}), handle(tmp_path))
    assert "worker 3 was lost" in str(lost) and "memory" in str(lost)
    error = Exception("controller")
    error.controller_failure = TimeoutError("no room")  # type: ignore[attr-defined]
    assert "could not run the workers: no room" in str(user_error(error, handle(tmp_path)))


def test_workers_get_what_they_need_and_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ECHOX_CACHE": "/c",
        "MLFLOW_TRACKING_TOKEN": "t",
        "AWS_SECRET": "s",
        "NCCL_DEBUG": "INFO",
    }.items():
        monkeypatch.setenv(name, value)
    on_cpu = worker_environment(load_recipe("demo/s2t"))
    assert on_cpu["DS_ACCELERATOR"] == "cpu" and on_cpu["OMP_NUM_THREADS"] == "1"
    assert on_cpu["ECHOX_CACHE"] == "/c" and on_cpu["MLFLOW_TRACKING_TOKEN"] == "t" and on_cpu["NCCL_DEBUG"] == "INFO"
    assert on_cpu["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert "AWS_SECRET" not in on_cpu
    on_gpu = worker_environment(load_recipe("demo/s2t", ["scaling.gpus_per_worker=1", "scaling.cpus_per_worker=6"]))
    assert "DS_ACCELERATOR" not in on_gpu and on_gpu["OMP_NUM_THREADS"] == "6"


def test_a_wrong_recipe_ends_with_its_sentence_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo/s2t", "optim.stepz=3", "data.micro_batch=many"]) == 2
    said = capsys.readouterr().err
    assert "stepz" in said and "micro_batch" in said and "Traceback" not in said


def test_the_driver_loads_no_torch_before_the_recipe_is_right() -> None:
    modules = "launch.train, launch.submit, launch.cli, launch.demo"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
