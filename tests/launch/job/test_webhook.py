"""A webhook on a real HTTP server: told once how a job ended, bounded in time, and its URL shown nowhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch.job import webhook
from launch.job.command_line import ABORTED
from launch.job.ending import LONGEST_WHY, Ending
from launch.job.webhook import VARIABLE, Webhook

SECRET = "s3cr3t-9f"
DRIVER = """
    import os, sys, time
    from pathlib import Path
    from launch.events import JobLog
    from launch.job.command_line import arguments
    from launch.job.signals import StopSignals, die_with
    args = arguments("stand-in").parse_intermixed_args()
    die_with(args.parent)
    signals = StopSignals()
    signals.listen()
    plan = os.environ["PLAN"].split()[args.restart]
    log = JobLog(Path(os.environ["RUN"]))
    (log.run_folder / f"environment-{args.restart}").write_text(repr(dict(os.environ)))
    if plan == "finish":
        log("end", status="FINISHED")
    elif plan == "wait":
        log("waiting")
        while not signals.asked:
            time.sleep(0.02)
        log("stopped", why=signals.why, step=7, checkpoint="")
        log("end", status="KILLED")
    elif plan == "fail":
        log("failed", error="shard-000001.tar is cut short <!channel>")
        log("end", status="FAILED")
        os._exit(4)
    else:
        os._exit(int(plan))
"""
JOB = """
    import functools, sys
    from launch import train
    train.Supervisor = functools.partial(train.Supervisor, module="stand_in_driver")
    sys.exit(train.main(sys.argv[1:]))
"""


class Server(ThreadingHTTPServer):
    """Takes messages, after as many refusals as a test wants."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.messages: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.asked: list[str] = []
        self.holds_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/services/{SECRET}?token={SECRET}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.holds_up.is_set():
            time.sleep(3)
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if answer == 200:
            assert self.headers["Content-Type"] == "application/json"
            self.server.messages.append(json.loads(body))
        self.send_response(answer)
        if answer == 302:
            self.send_header("Location", f"/elsewhere/{SECRET}")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    (tmp_path / "stand_in_driver.py").write_text(textwrap.dedent(DRIVER))

    def start(plan: str, url: str, *words: str) -> subprocess.Popen[str]:
        run = tmp_path / "runs" / "said"
        (run / "log").mkdir(parents=True)
        earlier = {"time": 1.0, "event": "job_end", "rank": "driver", "step": 3, "attempt": 1, "status": "FINISHED"}
        (run / "log" / "driver.jsonl").write_text(json.dumps(earlier) + "\n")
        (run / "progress.json").write_text('{"step": 7, "attempt": 1}')
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PLAN": plan, "RUN": str(run), VARIABLE: url}
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(JOB), "demo/t2c", f"storage={run.parent}", "name=said", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def written(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "runs").rglob("*")) if path.is_file())


@pytest.mark.parametrize(
    ("plan", "code", "status", "why"),
    [
        ("finish", 0, "finished", ""),
        ("75 70 finish", 0, "finished", ""),
        ("fail", 4, "failed", "shard-000001.tar is cut short <!channel>"),
        ("70 2 finish", 1, "failed", "the driver crashed"),
        ("wait", 0, "stopped", "SIGTERM"),
        ("0", 0, "stopped", "asked to before it began"),
    ],
)
def test_a_job_tells_once_how_it_ended(
    job: Callable[..., subprocess.Popen[str]],
    server: Server,
    tmp_path: Path,
    plan: str,
    code: int,
    status: str,
    why: str,
) -> None:
    process = job(plan, server.url, "scaling.max_failures=1")
    if plan == "wait":
        log = tmp_path / "runs" / "said" / "log" / "driver.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and "job_waiting" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    (message,) = server.messages
    assert message.keys() == {"text", "run", "stage", "status", "step", "why", "host"}
    expected = {"run": "said", "stage": "t2c", "status": status, "step": 7, "why": why, "host": socket.gethostname()}
    assert {key: message[key] for key in expected} == expected
    assert message["text"].startswith(f"EchoX run said (t2c) {status} at step 7 on ")
    assert "<" not in message["text"] and (not why or why.split("<")[0] in message["text"])
    assert "environment-0" in "".join(os.listdir(tmp_path / "runs" / "said"))
    assert SECRET not in said + written(tmp_path) and VARIABLE not in written(tmp_path)


def test_a_wrong_recipe_is_a_failed_job(job: Callable[..., subprocess.Popen[str]], server: Server) -> None:
    process = job("finish", server.url, "optim.stepz=1")
    said, _ = process.communicate(timeout=60)
    (message,) = server.messages
    assert process.returncode == 2 and message["status"] == "failed" and message["run"] == "demo/t2c"
    assert "optim.stepz" in message["why"] and "\n" not in message["why"] and SECRET not in said


@pytest.mark.parametrize("broken", ["{}/a", "{}:x/a", "{} x/a", "{}/a b"])
def test_a_webhook_that_cannot_be_reached_costs_a_warning(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, broken: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = broken.format(f"http://127.0.0.1:{free.getsockname()[1]}") + f"/{SECRET}?token={SECRET}"
        process = job("fail", url)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    assert [line for line in said.splitlines() if line.startswith("warning: ")] == [
        line for line in said.splitlines() if VARIABLE in line
    ]
    assert said.count(VARIABLE) == 1 and SECRET not in said + written(tmp_path)


@pytest.mark.parametrize(("refusals", "taken"), [([], True), ([500, 429], True), ([500, 404, 500], False)])
def test_it_is_tried_three_times(
    server: Server, quick: None, capsys: pytest.CaptureFixture[str], refusals: list[int], taken: bool
) -> None:
    server.answers = list(refusals)
    assert Webhook(server.url).post({"text": "a"}) == taken
    said = capsys.readouterr().out
    assert len(server.asked) == min(3, len(refusals) + 1) and len(server.messages) == taken
    expected = f"warning: {VARIABLE} at 127.0.0.1:{server.server_port} took no message: HTTP 500\n"
    assert said == ("" if taken else expected)


def test_a_redirect_is_no_success_and_not_followed(server: Server, quick: None) -> None:
    server.answers = [302, 302, 302]
    assert not Webhook(server.url).post({"text": "a"})
    assert len(server.asked) == 3 and not any("elsewhere" in asked for asked in server.asked)


@pytest.mark.parametrize("patience", ["TRY_S", "LIMIT_S"])
def test_a_server_that_does_not_answer_holds_up_no_job(
    server: Server, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], patience: str
) -> None:
    server.holds_up.set()
    monkeypatch.setattr(webhook, patience, 0.2)
    began = time.monotonic()
    assert not Webhook(server.url).post({"text": "a"})
    assert time.monotonic() - began < 2.5
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and SECRET not in said
    assert webhook.TRIES * webhook.TRY_S <= 30 and webhook.LIMIT_S <= 30


@pytest.mark.parametrize("url", ["ftp://h/x", "hooks/x", "file:///etc/passwd", "https://me:pw@h/x", "http://[h/x", "h"])
def test_what_is_no_web_address_is_said_and_not_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {VARIABLE: url}
    assert Webhook.take(environment) is None and environment == {}
    said = capsys.readouterr().out
    assert said.startswith(f"warning: nothing will be posted to {VARIABLE}: it is no ") and url not in said.split()


def test_without_the_variable_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert Webhook.take({}) is None and Webhook.take({VARIABLE: " "}) is None
    assert capsys.readouterr().out == ""


def event(name: str, **values: Any) -> Any:
    return {"event": name, **values}


@pytest.mark.parametrize(
    ("code", "events", "status", "why"),
    [
        (0, [event("job_end", status="KILLED"), event("job_end", status="FINISHED")], "finished", ""),
        (0, [event("job_stopped", why="SIGINT"), event("job_end", status="KILLED")], "stopped", "SIGINT"),
        (ABORTED, [event("job_aborted", why="SIGTERM, twice")], "stopped", "SIGTERM, twice"),
        (0, [], "stopped", "asked to before it began"),
        (1, [event("job_end", status="FINISHED")], "failed", "exit code 1"),
        (4, [event("job_driver_lost", error="a"), event("job_failed", error="b")], "failed", "b"),
        (1, [event("job_failed", error="b"), event("job_driver_lost", error="a")], "failed", "a"),
    ],
)
def test_an_ending_is_read_from_the_code_and_the_events(code: int, events: list[Any], status: str, why: str) -> None:
    assert Ending.of(code, events) == Ending(status=status, why=why)


def test_a_reason_is_short_and_without_secrets() -> None:
    why = f"cannot read https://me:{SECRET}@host/a?token={SECRET}:\n  - x" + "y" * LONGEST_WHY
    message = Ending(status="failed", why=why).message(run="r", stage="", step=0)
    assert SECRET not in str(message) and len(message["why"]) == LONGEST_WHY and "\n" not in message["text"]
    assert message["text"].startswith("EchoX run r failed at step 0 on ")
