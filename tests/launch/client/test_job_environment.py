"""What a job is given: as `ray job submit` would give it, without a secret, to the cluster behind any proxy."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echox.cli import main
from echox.errors import LaunchError
from launch.client.address import VARIABLES
from launch.client.job_environment import EXCLUDES, JobEnvironment, parse_variables
from launch.client.jobs import Jobs
from tests.launch.client.stub_api import StubApi, stub_api

SECRET = "s3cr3t-9f"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def api() -> Iterator[StubApi]:
    with stub_api() as server:
        yield server


def submitted(api: StubApi) -> dict[str, Any]:
    (job,) = [json.loads(body) for body in api.sent if body.startswith(b"{")]
    return dict(job)


def submit(api: StubApi, *words: str) -> dict[str, Any]:
    assert main(["submit", "demo/t2c", "--address", api.address, *words]) == 0
    return submitted(api)


def test_a_job_gets_packages_variables_and_room(
    api: StubApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FROM_HERE", "here")
    monkeypatch.setenv("ECHOX_X", "ours")
    file = tmp_path / "env.yaml"
    file.write_text("pip: [six==1.16.0]\nenv_vars: {A: file, ECHOX_X: file, B: file}\nexcludes: [more/]\n")
    words = ["--runtime-env", str(file), "--env", "A=line=2", "--env", "FROM_HERE"]
    words += ["--entrypoint-num-cpus", "0.5", "--entrypoint-resources", '{"head": 0.1}']
    job = submit(api, *words)
    given = job["runtime_env"]
    assert given["pip"] == ["six==1.16.0"] or given["pip"]["packages"] == ["six==1.16.0"]
    variables = {name: given["env_vars"][name] for name in ("A", "B", "ECHOX_X", "FROM_HERE")}
    assert variables == {"A": "line=2", "B": "file", "ECHOX_X": "file", "FROM_HERE": "here"}
    assert given["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert job["entrypoint_num_cpus"] == 0.5 and job["entrypoint_resources"] == {"head": 0.1}
    assert not job.get("entrypoint_num_gpus") and job["entrypoint"].startswith("python -m launch.train launch/recipes/")
    more = JobEnvironment(described={"excludes": ["more/"]}).runtime_env(tmp_path, {})
    assert more["excludes"] == [*EXCLUDES, "more/"]


def test_an_image_holds_the_project_itself(api: StubApi) -> None:
    job = submit(api, "--image", "registry.example/echox:1")
    assert set(job["runtime_env"]) - {"_ray_commit"} == {"image_uri", "env_vars"}
    assert job["entrypoint"] == "python -m launch.train demo/t2c"
    assert not any(path.startswith("PUT /api/packages") for path in api.asked), "nothing was sent"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", f"HF_TOKEN={SECRET}"], "HF_TOKEN holds a secret"),
        (["--env", f"DB=postgresql://me:{SECRET}@db/x"], "DB holds a secret"),
        (["--env", f"AWS_SECRET_ACCESS_KEY={SECRET}"], "AWS_SECRET_ACCESS_KEY holds a secret"),
        (["--env", f"ECHOX_WEBHOOK=https://hooks.example/{SECRET}"], "ECHOX_WEBHOOK holds a secret"),
        (["--env", f"{SECRET} x"], "is no NAME=VALUE"),
        (["--env", "NOT_SET_HERE"], "--env NOT_SET_HERE is no NAME=VALUE, and no variable here"),
        (["--headers", f"Authorization: {SECRET}"], "--headers is no JSON object"),
        (["--entrypoint-resources", "[1]"], "--entrypoint-resources is no JSON object"),
        (["--image", "x:1", "--runtime-env", "pip.yaml"], "Ray knows no such runtime environment: The 'image_uri'"),
        (["--runtime-env", "unknown.yaml"], "Ray knows no such runtime environment: unknown field pips"),
        (["--runtime-env", "list.yaml"], "the file describes no runtime environment"),
        (["--runtime-env", "bomb.yaml"], "cannot be read: more than 32 aliases"),
        (["--runtime-env", "absent.yaml"], "cannot be read: No such file"),
        (["--runtime-env", "secret.yaml"], "WANDB_API_KEY holds a secret"),
        (["--verify", "absent.pem"], "absent.pem"),
    ],
)
def test_what_cannot_be_given_is_one_sentence(
    api: StubApi,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    files = {"pip.yaml": "pip: [six]", "unknown.yaml": "pips: [six]", "list.yaml": "[1]", "bomb.yaml": "\n".join(lines),
             "secret.yaml": f"env_vars: {{WANDB_API_KEY: {SECRET}}}"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["submit", "demo/t2c", "--address", api.address, *words]) == LaunchError.exit_code
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err
    assert SECRET not in (printed.err + printed.out).replace(f"--env {SECRET} x", "")
    assert not any(path.startswith("POST") for path in api.asked)


def test_variables_of_here_that_hold_a_secret_stay_here(api: StubApi, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"HF_HOME": "/hf", "HF_TOKEN": SECRET, "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@h", "OTHER": "x"}
    for name, value in {**here, "ECHOX_WEBHOOK": f"https://hooks.example/{SECRET}"}.items():
        monkeypatch.setenv(name, value)
    given = submit(api)["runtime_env"]["env_vars"]
    assert given["HF_HOME"] == "/hf" and "OTHER" not in given and SECRET not in str(given)


def test_a_variable_may_be_empty() -> None:
    assert parse_variables(["A=", "B=c"]) == {"A": "", "B": "c"}


def test_headers_go_with_every_request_and_the_server_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True)  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"X-Proxy": "from-env"}))
    with stub_api(context) as server:
        address = f"https://localhost:{server.server_port}"
        with pytest.raises(LaunchError, match="is not trusted here.*--verify"):
            Jobs(address)
        assert Jobs(address, authority=certificate).list() == []
        assert Jobs(address, headers={"X-Proxy": "said"}, authority=certificate).list() == []
        sent = [headers["X-Proxy"] for headers in server.headers]
        half = len(sent) // 2
        assert half > 1 and sent == ["from-env"] * half + ["said"] * half


def test_another_users_job_is_not_stopped_without_force(
    api: StubApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"type": "SUBMISSION", "submission_id": "demo-t2c-a1", "status": "RUNNING", "entrypoint": "x",
           "start_time": 1, "metadata": {"run": "demo-t2c", "user": "alice", "attempt": "1"}}  # fmt: skip
    api.jobs = [job]
    monkeypatch.setattr("launch.client.jobs.user_name", lambda: "bob")
    assert main(["stop", "demo-t2c", "--address", api.address]) == LaunchError.exit_code
    assert "job demo-t2c-a1 is alice's, and you are bob" in capsys.readouterr().err
    assert not any(path.endswith("/stop") for path in api.asked) and job["status"] == "RUNNING"
    assert main(["stop", "demo-t2c", "--address", api.address, "--force"]) == 0
    assert "POST /api/jobs/demo-t2c-a1/stop" in api.asked
    job["status"] = "RUNNING"
    monkeypatch.setattr("launch.client.jobs.user_name", lambda: "alice")
    assert main(["stop", "demo-t2c", "--address", api.address]) == 0 and job["status"] == "STOPPED"
