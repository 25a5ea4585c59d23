from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from echox.errors import DataError, LaunchError, TransientReadError
from launch.job.driver import grace_s
from launch.job.failure_cause import error_file, find_cause
from launch.train import main


class WorkerGroupError(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("Training failed due to worker errors:\n a traceback")
        self.worker_failures = failures


class RayActorError(Exception):
    pass


class ActorDiedError(RayActorError):
    pass


class Wrapped(Exception):
    def __init__(self, inner: BaseException) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self._base_exc = inner


def test_a_users_error_wins_over_the_ranks_that_only_lost_their_peer(tmp_path: Path) -> None:
    cause = DataError("shard-000001.tar is cut short", where="tiny", fix="build it again")
    error = WorkerGroupError({0: Wrapped(RuntimeError("Connection closed by peer")), 1: Wrapped(cause)})
    found = find_cause(error, tmp_path)
    assert found.error is cause and found.kind == "error" and found.rank == 1


def test_a_bug_names_the_file_with_the_traceback(tmp_path: Path) -> None:
    path = error_file(tmp_path, 1)
    path.parent.mkdir(parents=True)
    path.write_text("Traceback ...")
    error = WorkerGroupError({0: RuntimeError("actor died"), 1: Wrapped(ZeroDivisionError("division by zero\nmore"))})
    told = find_cause(error, tmp_path).error
    assert isinstance(told, LaunchError)
    assert "worker 1 failed: ZeroDivisionError: division by zero" in str(told) and str(path) in str(told)
    assert "\n" not in str(told)


def test_a_killed_worker_and_a_failed_controller_are_told_apart(tmp_path: Path) -> None:
    lost = find_cause(WorkerGroupError({3: ActorDiedError("The actor died unexpectedly")}), tmp_path).error
    assert "worker 3 was lost" in str(lost) and "memory" in str(lost)
    error = Exception("controller")
    error.controller_failure = TimeoutError("no room")  # type: ignore[attr-defined]
    assert "could not run the workers: no room" in str(find_cause(error, tmp_path).error)


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("failures", "kind", "rank"),
    [
        ({0: PEER, 1: ActorDiedError("gone"), 2: PEER}, "lost", 1),
        ({0: PEER, 1: PEER, 2: ZeroDivisionError("x")}, "crash", 2),
        ({0: ZeroDivisionError("y"), 1: ValueError("z"), 2: ActorDiedError("x")}, "crash", 1),
        ({0: PEER, 1: PEER}, "peer", 1),
        ({0: TransientReadError("timed out")}, "crash", 0),
    ],
)
def test_the_rank_that_failed_first_is_named_and_no_rank_that_lost_it(
    tmp_path: Path, failures: dict[int, BaseException], kind: str, rank: int
) -> None:
    events = [{"rank": 1, "time": 10.0}, {"rank": 0, "time": 10.1}, {"rank": 1, "time": 10.2}]
    found = find_cause(WorkerGroupError(failures), tmp_path, events)
    assert (found.kind, found.rank) == (kind, rank)


def test_the_grace_is_what_ray_gives_less_the_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    assert grace_s() == 2.25
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    assert grace_s() == 105


def test_a_wrong_recipe_ends_with_its_sentence_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo/s2t", "optim.stepz=3", "data.micro_batch=many"]) == 2
    said = capsys.readouterr().err
    assert "stepz" in said and "micro_batch" in said and "Traceback" not in said


def test_the_driver_loads_no_torch_before_the_recipe_is_right() -> None:
    modules = "launch.train, launch.client.jobs, launch.cli, launch.demo.pipeline"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
