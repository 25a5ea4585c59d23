"""A real server on a port of this machine, and requests to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from typing import Any

import numpy as np
import soundfile
import uvicorn

from echox.serve.limits import Limits
from echox.speak.pipeline import SpeechToSpeech
from tests.speak.echo_run import MAX_NEW, clips

LIMITS = Limits(question_s=2.0, body_bytes=200_000, turns=3, tokens=MAX_NEW, open=2, waiting=2)


class Served:
    """A server, and requests to it."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, port=0, log_level="error")
        socket = config.bind_socket()
        self.port = socket.getsockname()[1]
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([socket],))
        self._thread.start()
        began = time.monotonic()
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() - began < 60
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def begin(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse()

    def ask(self, path: str = "/answer", body: Any = None, **headers: str) -> tuple[int, list[dict[str, Any]]]:
        """Status, and the events or the error."""
        response = self.begin("POST", path, body, **headers)
        return response.status, [json.loads(line) for line in response.read().splitlines()]


def wav(clip: Any, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def long(model: SpeechToSpeech) -> Any:
    return max(clips(), key=lambda clip: len(model.answer([clip])[0].text))


def pcm_of(events: list[dict[str, Any]]) -> np.ndarray:
    found = [np.frombuffer(base64.b64decode(each["pcm16"]), "<i2") for each in events if each["event"] == "audio"]
    return np.concatenate([np.zeros(0, np.int16), *found])
