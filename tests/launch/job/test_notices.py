"""Notices of preemption, from servers that answer as the clouds document their metadata services."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from echox.errors import LaunchError
from launch.job import notices
from launch.job.notices import NoticeWatch, aws, azure, gcp, watch_for_notices

Answer = Callable[[str, str, Any], tuple[int, str]]


@contextmanager
def served(answer: Answer) -> Iterator[str]:
    """A metadata service: method, path and headers to status and body."""

    class Handler(BaseHTTPRequestHandler):
        def _said(self) -> None:
            status, body = answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = _said

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("notice", "left_s"), [(None, None), ({"action": "terminate", "time": "2026-01-01T00:02:00Z"}, 120.0)]
)
def test_a_spot_instance_of_aws(notice: dict[str, str] | None, left_s: float | None) -> None:
    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token"):
            return (200, "secret") if headers.get("X-aws-ec2-metadata-token-ttl-seconds") else (400, "")
        if headers.get("X-aws-ec2-metadata-token") != "secret":
            return 401, ""
        if path != "/latest/meta-data/spot/instance-action" or notice is None:
            return 404, ""
        return 200, json.dumps(notice)

    with served(answer) as base:
        assert aws(base) == left_s


@pytest.mark.parametrize(("text", "left_s"), [("FALSE", None), ("TRUE\n", 30.0)])
def test_a_spot_vm_of_gcp(text: str, left_s: float | None) -> None:
    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        return (200, text) if path == "/computeMetadata/v1/instance/preempted" else (404, "")

    with served(answer) as base:
        assert gcp(base) == left_s


@pytest.mark.parametrize(
    ("events", "left_s"),
    [
        ([], None),
        ([{"EventType": "Reboot", "Resources": ["mine"]}], None),
        ([{"EventType": "Preempt", "Resources": ["another"]}], None),
        ([{"EventType": "Preempt", "Resources": ["another", "mine"]}], 30.0),
    ],
    ids=["none", "another kind", "another machine", "this machine"],
)
def test_a_spot_vm_of_azure(events: list[dict[str, Any]], left_s: float | None) -> None:
    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if headers.get("Metadata") != "true":
            return 400, ""
        if path.startswith("/metadata/scheduledevents?api-version="):
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": events})
        return (200, "mine") if path.startswith("/metadata/instance/compute/name?") else (404, "")

    with served(answer) as base:
        assert azure(base) == left_s


def test_a_notice_is_told_once_and_a_service_that_fails_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "POLL_S", 0.001)
    answers: list[float | None | Exception] = [
        None,
        requests.ConnectionError("away"),
        ValueError("odd"),
        None,
        30.0,
        30.0,
    ]
    told: list[float] = []
    heard = threading.Event()

    def ask() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(left_s: float) -> None:
        told.append(left_s)
        heard.set()

    with NoticeWatch(ask, tell):
        assert heard.wait(10)
    assert told == [30.0] and answers == [30.0]
    assert caplog.text.count("does not say whether it takes this node back") == 1


def test_only_a_node_that_says_whose_it_is_asks_and_only_its_first_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notices.VARIABLE, raising=False)
    assert watch_for_notices(0) is None
    monkeypatch.setenv(notices.VARIABLE, "gcp")
    assert watch_for_notices(1) is None and watch_for_notices(0) is not None
    monkeypatch.setenv(notices.VARIABLE, "moon")
    with pytest.raises(LaunchError, match="ECHOX_PREEMPTION=moon names no cloud"):
        watch_for_notices(0)
