"""A server that answers as much of Ray's job API as a client asks before it submits, and keeps what it was asked."""

from __future__ import annotations

import json
import ssl
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
        headers: of every GET.
        jobs: what it knows; a job that is stopped ends at once.
        nodes: what `/nodes?view=summary` answers; None is an error of the server.
    """

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.headers: list[Any] = []
        self.jobs: list[dict[str, Any]] = []
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
        content = self._take("POST")
        if self.path.endswith("/stop"):
            self._named()["status"] = "STOPPED"
            return self._answer({"stopped": True})
        body = json.loads(content)
        self._answer({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    def do_GET(self) -> None:
        import ray

        self.server.asked.append(f"GET {self.path}")
        self.server.headers.append(self.headers)
        if self.path.startswith("/api/jobs/") and self.path != "/api/jobs/":
            return self._answer(self._named())
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": "stub"}
        answers: dict[str, Any] = {"/api/version": version, "/api/jobs/": self.server.jobs, "/nodes": self.server.nodes}
        self._answer(answers.get(self.path.partition("?")[0]))

    def _named(self) -> dict[str, Any]:
        return next(job for job in self.server.jobs if job["submission_id"] == self.path.split("/")[3])

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
def stub_api(context: ssl.SSLContext | None = None) -> Iterator[StubApi]:
    """A server for the length of the block; over TLS with a context."""
    server = StubApi(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
