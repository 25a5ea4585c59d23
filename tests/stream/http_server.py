"""A web server of one folder that honours ranges and misbehaves on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Answer:
    """What the server is about to send; faults change it."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bytes


Fault = Callable[[Answer], None]


def unavailable(answer: Answer) -> None:
    answer.status, answer.body = 503, b"busy"
    answer.headers = {"Content-Length": "4"}


def short(answer: Answer) -> None:
    """The connection breaks in the middle of the body."""
    answer.body = answer.body[: len(answer.body) // 2]


def whole_for_part(answer: Answer) -> None:
    answer.status, answer.body = 200, answer.whole
    answer.headers = {"Content-Length": str(len(answer.whole))}


def wrong_range(answer: Answer) -> None:
    answer.headers["Content-Range"] = answer.headers["Content-Range"].replace("bytes 0", "bytes 1")


def short_and_honest(answer: Answer) -> None:
    """Fewer bytes than the range, with a length that fits them."""
    answer.body = answer.body[:-1]
    answer.headers["Content-Length"] = str(len(answer.body))


def flipped(answer: Answer) -> None:
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    answer.body = bytes(body)


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of the folder.
        faults: (pattern of the file's name, fault, how often it happens).
        requests: (file's name, range) in order of arrival.
    """

    url: str
    faults: list[tuple[str, Fault, int]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spoil(self, name: str, answer: Answer) -> None:
        with self.lock:
            for place, (pattern, fault, times) in enumerate(self.faults):
                if times and re.search(pattern, name):
                    self.faults[place] = (pattern, fault, times - 1)
                    fault(answer)
                    return


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.strip("/")
            asked = self.headers.get("Range", "")
            with state.lock:
                state.requests.append((name, asked))
            path = folder / name
            if not path.is_file():
                self.send_error(404)
                return
            whole = path.read_bytes()
            answer = Answer(200, {"Content-Length": str(len(whole))}, whole, whole)
            if asked:
                start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
                body = whole[start : stop + 1]
                given = f"bytes {start}-{start + len(body) - 1}/{len(whole)}" if body else f"bytes */{len(whole)}"
                answer = Answer(
                    206 if body else 416, {"Content-Length": str(len(body)), "Content-Range": given}, body, whole
                )
            state.spoil(name, answer)
            self.send_response(answer.status)
            for header, value in answer.headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(answer.body)
            if len(answer.body) < int(answer.headers["Content-Length"]):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
