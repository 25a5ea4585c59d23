"""Serves the S3 protocol on loopback, and can fail as object stores and the way to them do.

The store is moto's own server, which answers real clients over HTTP. In front of it sits a layer that answers 500, cuts
a request or a response in the middle, waits, or lists what was there before the last change.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Start = Callable[..., Any]


@dataclass
class Faults:
    """What goes wrong: shares of requests, drawn from a seed; nothing as it is made.

    Attributes:
        errors: answered with 500 and not done.
        lost: done, and then answered with 500.
        cut_uploads: whose body is read to the half, before the connection closes.
        cut_downloads: whose answer ends in the middle.
        slow_s: the longest that any request waits.
        stale_lists: whether a listing is the one before.
        done: how often each happened.
        requests: method and path of each.
    """

    errors: float = 0.0
    lost: float = 0.0
    cut_uploads: float = 0.0
    cut_downloads: float = 0.0
    slow_s: float = 0.0
    stale_lists: bool = False
    seed: int = 17
    done: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()
        self._lists: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {}

    def around(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The layer, as a WSGI application."""

        def serve(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
            method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")
            with self._lock:
                self.requests.append((method, path))
            time.sleep(self._chance.uniform(0, self.slow_s))
            if self._happens("errors", self.errors):
                return _failed(start)
            if method in ("PUT", "POST") and self._happens("cut_uploads", self.cut_uploads):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
                return _closed(environ)
            status, headers, body = _answer(application, environ)
            if self._happens("lost", self.lost):
                return _failed(start)
            if self.stale_lists and method == "GET" and "list-type" in query:
                status, headers, body = self._stale(f"{path}?{query}", (status, headers, body))
            if method == "GET" and len(body) > 1 and self._happens("cut_downloads", self.cut_downloads):
                start(status, headers)
                return _halved(environ, body)
            start(status, headers)
            return [body]

        return serve

    def _happens(self, name: str, share: float) -> bool:
        with self._lock:
            happens = self._chance.random() < share
            self.done[name] = self.done.get(name, 0) + happens
        return happens

    def _stale(self, key: str, now: tuple[str, list[tuple[str, str]], bytes]) -> tuple[Any, Any, Any]:
        with self._lock:
            before = self._lists.get(key, now)
            self._lists[key] = now
            self.done["stale_lists"] = self.done.get("stale_lists", 0) + (before[2] != now[2])
        return before


@contextmanager
def serve_s3(bucket: str, faults: Faults | None = None) -> Iterator[dict[str, str]]:
    """A server with an empty bucket; the variables by which clients find it."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None: ...

    calm: Callable[..., Iterable[bytes]] = DomainDispatcherApplication(create_backend_app)
    application = calm if faults is None else faults.around(calm)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = (0.0,) * 4
    if faults is not None:
        before = (faults.errors, faults.lost, faults.cut_uploads, faults.cut_downloads)
        faults.errors = faults.lost = faults.cut_uploads = faults.cut_downloads = 0.0
    client = boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    if faults is not None:
        faults.errors, faults.lost, faults.cut_uploads, faults.cut_downloads = before
    try:
        yield variables
    finally:
        server.shutdown()
        thread.join()


def _answer(
    application: Callable[..., Iterable[bytes]], environ: dict[str, Any]
) -> tuple[str, list[tuple[str, str]], bytes]:
    said: list[Any] = []

    def start(status: str, headers: list[tuple[str, str]], error: Any = None) -> None:
        said[:] = [status, headers]

    body = b"".join(application(environ, start))
    return said[0], said[1], body


def _failed(start: Start) -> list[bytes]:
    body = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
    start("500 Internal Server Error", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _halved(environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _close(environ)


def _closed(environ: dict[str, Any]) -> list[bytes]:
    _close(environ)
    raise ConnectionAbortedError


def _close(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
