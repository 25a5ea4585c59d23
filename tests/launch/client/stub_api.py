"""A server that answers as much of Ray's job API as a client asks before it submits, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubApi(ThreadingHTTPServer):
    """One cluster.

    Attributes:
        asked: method and path of every request.
        sent: body of every request that had one.
        nodes: what `/nodes?view=summary` answers; None is an error of the server.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.sent: list[bytes] = []
        self.nodes: Any = None

    @property
    def address(self) -> str:
        """Of its job API."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StubApi

    def do_PUT(self) -> None:
        self._take("PUT")
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._take("POST"))
        self._answer({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    def do_GET(self) -> None:
        import ray

        self.server.asked.append(f"GET {self.path}")
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "stub"}
        answers: dict[str, Any] = {"/api/version": version, "/api/jobs/": [], "/nodes": self.server.nodes}
        self._answer(answers.get(self.path.partition("?")[0]))

    def _take(self, method: str) -> bytes:
        self.server.asked.append(f"{method} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.sent.append(body)
        return body

    def _answer(self, answer: Any) -> None:
        missing = 404 if self.path.startswith("/api/packages") else 500
        body = json.dumps(answer).encode()
        self.send_response(missing if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def stub_api() -> Iterator[StubApi]:
    """A server for the length of the block."""
    server = StubApi()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
