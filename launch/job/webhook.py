"""Posts one JSON message to a webhook, within half a minute and without showing where it went."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

VARIABLE = "ECHOX_WEBHOOK"
"""Of the head's environment. Whoever knows the URL may post there: it is in no recipe and no log, and not handed on."""
TRIES = 3
TRY_S = 10.0
PAUSE_S = 1.0
LIMIT_S = 30.0
"""For all tries together: a name server or a proxy may hold up a request beyond its own limit."""


class Webhook:
    """Where a message goes.

    Args:
        url: http:// or https://, without a login.

    Raises:
        ValueError: it is something else; the text does not show it.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            self.host = parts.netloc
        except ValueError:
            raise ValueError("it is no URL") from None
        if parts.scheme not in ("http", "https") or not self.host or "@" in self.host:
            raise ValueError("it is no http:// or https:// URL without a login")
        self._url = url

    @classmethod
    def take(cls, environment: MutableMapping[str, str] = os.environ) -> Webhook | None:
        """The webhook of the environment, where the processes that this one starts no longer find it."""
        url = environment.pop(VARIABLE, "").strip()
        try:
            return cls(url) if url else None
        except ValueError as error:
            print(f"warning: nothing will be posted to {VARIABLE}: {error}", flush=True)
            return None

    def post(self, message: Mapping[str, Any]) -> bool:
        """Post a message; a failure is one warning."""
        problems: list[str] = []
        sent = threading.Event()
        body = json.dumps(message).encode()

        def work() -> None:
            for attempt in range(TRIES):
                if attempt:
                    time.sleep(PAUSE_S)
                problem = _sent(self._url, body)
                if not problem:
                    sent.set()
                    return
                problems.append(problem)

        thread = threading.Thread(target=work, name="webhook", daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        if not sent.is_set():
            why = problems[-1] if problems else f"no answer in {LIMIT_S:g} s"
            print(f"warning: {VARIABLE} at {self.host} took no message: {why}", flush=True)
        return sent.is_set()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and its answer pass for success."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _sent(url: str, body: bytes) -> str:
    """What went wrong, in words that hold nothing of the URL; empty if nothing did."""
    headers = {"Content-Type": "application/json", "User-Agent": "echox"}
    try:
        request = urllib.request.Request(url, data=body, headers=headers)
        urllib.request.build_opener(_NoRedirects).open(request, timeout=TRY_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return (reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__
    except Exception as error:  # such as an InvalidURL, whose text is the URL
        return type(error).__name__
    return ""
