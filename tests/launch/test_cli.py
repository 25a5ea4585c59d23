from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echox.cli import main
from echox.errors import LaunchError
from launch import cli
from launch.client import local_head
from launch.client.job_environment import EXCLUDES, JobEnvironment
from launch.client.jobs import Jobs, token_header
from launch.client.resubmit import submit_and_follow


class FakeJobs:
    address = "http://head:8265"
    final = "SUCCEEDED"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def submit(
        self, recipe: str, overrides: list[str], *, environment: JobEnvironment, extra_arguments: list[str]
    ) -> str:
        self.calls.append((recipe, overrides, *extra_arguments))
        self.environment = environment
        return "demo-s2t-a1"

    def list(self, run: str | None = None) -> list[dict[str, Any]]:
        job = {
            "attempt": 1,
            "message": "all good\nmore",
            "exit_code": None,
            "start": 100.0,
            "end": 3765.0,
            "folder": "",
        }
        return [
            {**job, "id": "demo-s2t-a1", "run": "demo-s2t", "status": "FAILED"},
            {**job, "id": "demo-s2t-a2", "run": "demo-s2t", "status": "RUNNING"},
            {**job, "id": "demo-t2c-a1", "run": "demo-t2c", "status": "PENDING"},
        ]

    find = Jobs.find

    def logs(self, job: str) -> str:
        return f"log of {job}\n"

    def follow(self, job: str) -> Iterator[str]:
        yield "one\n"
        yield "two\n"

    def wait(self, job: str) -> str:
        return self.final

    def stop(self, job: str, *, force: bool) -> str:
        return f"STOPPED{' by force' * force}"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    fake = FakeJobs()
    monkeypatch.setattr(cli, "connect", lambda args: fake)
    return fake


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(words)
    return int(args.run(args))


def test_submit_passes_the_recipe_on(jobs: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("submit", "demo/s2t", "optim.steps=3", "name=x", "--json") == 0
    assert jobs.calls == [("demo/s2t", ["optim.steps=3", "name=x"])]
    assert json.loads(capsys.readouterr().out) == {"id": "demo-s2t-a1", "address": "http://head:8265"}


def test_submit_lets_the_workers_answer_in_a_run_of_its_own(jobs: FakeJobs) -> None:
    assert run("submit", "demo/echo", "seed=3", "--respond") == 0
    assert run("submit", "demo/echo", "name=mine", "--respond") == 0
    task = ["--train", "echox.respond:respond_in_job"]
    assert jobs.calls == [
        ("demo/echo", ["seed=3", "name=demo-echo-respond"], *task),
        ("demo/echo", ["name=mine", "name=mine-respond"], *task),
    ]


def test_submit_passes_on_that_new_data_are_accepted(jobs: FakeJobs) -> None:
    assert run("submit", "demo/s2t", "--accept-new-data") == 0
    assert jobs.calls == [("demo/s2t", [], "--accept-new-data")]


def test_resume_submits_what_the_runs_folder_holds(jobs: FakeJobs, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="has run in"):
        run("resume", str(tmp_path))
    (tmp_path / "recipe.resolved.yaml").touch()
    assert run("resume", str(tmp_path), "optim.steps=9", "--allow", "lr,steps") == 0
    assert jobs.calls == [(str(tmp_path / "recipe.resolved.yaml"), ["optim.steps=9"], "--allow", "lr,steps")]
    with pytest.raises(LaunchError, match="folder of run nowhere was not found"):
        run("resume", "nowhere")


def test_a_lost_cluster_is_waited_for_and_the_run_submitted_again() -> None:
    class Cluster:
        """Its first job is forgotten with its head, the second fails, the third is refused, the last succeeds."""

        def __init__(self) -> None:
            self.away = 0
            self.ends = ["lost", ("FAILED", None), ("FAILED", 7), ("SUCCEEDED", 0)]
            self.jobs: list[dict[str, Any]] = []

        def connect(self) -> Any:
            self.away -= 1
            if self.away >= 0:
                raise LaunchError("no Ray cluster answers")
            return self

        def list(self) -> list[dict[str, Any]]:
            return self.jobs

        def submit(self, _: Any) -> str:
            end = self.ends.pop(0)
            self.jobs.append({"id": f"a{len(self.ends)}", "status": end[0], "exit_code": end[1], "lost": end == "lost"})
            return str(self.jobs[-1]["id"])

        def follow(self, job: str) -> Iterator[str]:
            yield f"log of {job}\n"
            if self.jobs[-1]["lost"]:
                self.jobs, self.away = [], 3
                raise LaunchError("no Ray cluster answers")

        def wait(self, job: str) -> str:
            return str(self.jobs[-1]["status"])

    written: list[str] = []
    ray: Any = Cluster()
    state = submit_and_follow(ray.connect, ray.submit, retries=3, write=written.append, wait_s=0)
    assert state == "SUCCEEDED" and ray.ends == []
    assert [line for line in written if "log of" in line] == [f"log of a{n}\n" for n in (3, 2, 1, 0)]
    ray = Cluster()
    ray.ends = [("FAILED", 4), ("SUCCEEDED", 0)]
    assert submit_and_follow(ray.connect, ray.submit, retries=3, write=written.append, wait_s=0) == "FAILED"
    ray = Cluster()
    assert submit_and_follow(ray.connect, ray.submit, retries=1, write=written.append, wait_s=0) == "FAILED"


@pytest.mark.parametrize(("final", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_following_ends_as_the_job_does(
    jobs: FakeJobs, capsys: pytest.CaptureFixture[str], final: str, code: int
) -> None:
    jobs.final = final
    assert run("submit", "demo/s2t", "-f") == code
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run("logs", "demo-s2t", "-f") == code


def test_status_lists_jobs_and_names_take_the_newest(jobs: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "demo-s2t") == 0
    said = capsys.readouterr().out
    assert (
        "demo-s2t-a2  RUNNING" in said
        and "demo-s2t-a1" in said
        and "1:01:05" in said
        and "all good" in said
        and "demo-t2c" not in said
    )
    assert run("logs", "demo-s2t") == 0
    assert capsys.readouterr().out == "log of demo-s2t-a2\n"
    assert run("stop", "demo-s2t-a1") == 0
    assert "demo-s2t-a1 STOPPED" in capsys.readouterr().out
    with pytest.raises(LaunchError, match="no job or run named nothing"):
        run("status", "nothing")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Authentication required: Unauthorized: Missing authentication token"), "401"),
        (RuntimeError("Authentication failed: Forbidden: Invalid authentication token"), "ray get-auth-token"),
        (ConnectionError("Failed to connect to Ray at address"), "no Ray cluster answers"),
        (RuntimeError("Request failed with status code 500: boom\nTraceback"), "status code 500: boom"),
    ],
)
def test_the_job_apis_errors_become_sentences(error: Exception, words: str) -> None:
    jobs = Jobs.__new__(Jobs)
    jobs.address = "http://head:8265"

    def fail() -> None:
        raise error

    with pytest.raises(LaunchError) as raised:
        jobs._call(fail)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_takes_no_request_to_stop_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop.json").mkdir()
    assert main(["stop", str(tmp_path)]) == LaunchError.exit_code
    said = capsys.readouterr().err
    assert "stop.json cannot be written there: Is a directory" in said and str(tmp_path) in said


def test_no_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_head, "remembered", lambda: None)
    with pytest.raises(LaunchError, match="no Ray cluster answers at http://127.0.0.1:9"):
        run("status", "--address", "http://127.0.0.1:9")


def test_the_token_comes_from_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert token_header() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert token_header() == {"Authorization": "Bearer from-home"}
    (tmp_path / "token").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert token_header() == {"Authorization": "Bearer from-path"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-env")
    assert token_header() == {"Authorization": "Bearer from-env"}


def test_the_package_that_travels_is_small_and_whole(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    travels = (
        *("launch/train.py", "launch/recipes/demo/s2t.yaml", "ds_configs/zero3_cpu.json", "echox/cli.py"),
        "shards/builder/rewrite.py",
    )
    for name in travels:
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("x")
    for name in (
        "runs/demo/m.bin",
        ".venv/lib/x.py",
        ".git/HEAD",
        "echox/__pycache__/c.pyc",
        "a/b.safetensors",
        "tests/t.py",
    ):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("y")
    import zipfile

    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "p"), package, include_gitignore=True, excludes=list(EXCLUDES))
    files = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert files == set(travels)
