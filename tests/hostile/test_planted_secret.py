"""One secret in every place where a user might put one: refused with the fix, or found nowhere afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from echox.cli import main
from echox.tracking.listing import of_server
from tests.launch.client.stub_api import StubApi, stub_api

SECRET = "s3cr3t-4711-9f"
VARIABLES = {
    "HF_TOKEN": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_ACCESS_KEY_ID": SECRET,
    "WANDB_API_KEY": SECRET,
    "PGPASSWORD": SECRET,
    "ECHOX_API_KEY": SECRET,
    "ECHOX_MIRROR": f"https://me:{SECRET}@mirror.example",
    "GOOGLE_APPLICATION_CREDENTIALS": SECRET,
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["train"], ["respond"], ["shards", "encode"], ["submit", "--dry-run"]])
@pytest.mark.parametrize(
    ("override", "fix"),
    [
        (f"tracking.uri=https://me:{SECRET}@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        (f"tracking.uri=postgresql://me:{SECRET}@db/mlflow", "PGPASSWORD"),
        (f"data.train.0.path=https://host/set?X-Amz-Signature={SECRET}", "~/.netrc"),
        (f"data.train.0.path=s3://me:{SECRET}@bucket/set", "~/.netrc"),
        (f"storage=https://me:{SECRET}@host/runs", "storage"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_by_every_command(
    command: list[str], override: str, fix: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = ["--cluster", "slurm"] if command[0] == "submit" else []
    assert main([*command, "demo/echo", override, *more]) == 2
    said = capsys.readouterr()
    assert fix in said.err and SECRET not in said.err + said.out


@pytest.mark.parametrize(
    "words",
    [
        ["shards", "index", f"https://host/set-{{0..1}}.tar?sig={SECRET}", "--out", "set"],
        ["shards", "index", f"https://me:{SECRET}@host/set", "--out", "set"],
        ["shards", "stats", f"https://host/set?token={SECRET}"],
        ["runs", "list", "--uri", f"http://me:{SECRET}@127.0.0.1:9"],
        ["runs", "compare", "a", "b", "--uri", f"http://me:{SECRET}@127.0.0.1:9"],
    ],
)
def test_a_url_with_a_secret_is_not_said_again_and_kept_nowhere(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(words) != 0
    said = capsys.readouterr()
    assert "echox: " in said.err and SECRET not in said.err + said.out
    assert holders(tmp_path) == []


def holders(folder: Path) -> list[str]:
    """Files below a folder that hold the secret, in their content or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if SECRET in path.name or SECRET.encode() in path.read_bytes()]


@pytest.fixture
def api() -> Iterator[StubApi]:
    with stub_api() as server:
        yield server


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("planted")
def test_the_job_api_is_told_no_secret(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    """Variables stay here; a header goes with the request and into no job."""
    header = json.dumps({"X-Proxy-Authorization": f"Bearer {SECRET}"})
    assert main(["submit", "demo/t2c", "--address", api.address, "--headers", header]) == 0
    assert any(f"Bearer {SECRET}" in str(headers) for headers in api.headers), "it reached the proxy"
    assert api.sent and not any(SECRET.encode() in body for body in api.sent)
    assert not any(SECRET in asked for asked in api.asked)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    for words in (["--env", f"MY_TOKEN={SECRET}"], ["--env", "HF_TOKEN"], ["--env", f"A=http://x:{SECRET}@y"]):
        assert main(["submit", "demo/t2c", "--address", api.address, *words]) == 7
        said = capsys.readouterr()
        assert "holds a secret" in said.err and SECRET not in said.out + said.err


def test_a_run_with_secrets_in_its_environment_keeps_none(tmp_path: Path) -> None:
    """Params, tags and metrics are in the database, whose bytes are searched like those of every other file."""
    environment = {**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT), "ECHOX_CACHE": str(tmp_path / "cache")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    worker = ROOT / "tests" / "engine" / "secret_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SECRET not in done.stdout + done.stderr
    runs = tmp_path / "runs"
    assert (runs / "mlflow.db").stat().st_size > 100_000 and (runs / "toy" / "checkpoints").is_dir()
    (run,), _ = of_server(f"sqlite:///{runs}/mlflow.db")
    assert run.mlflow is not None and run.mlflow.data.params["optim.steps"] == "2" and run.tag("stage") == "s2t"
    assert holders(tmp_path) == []
