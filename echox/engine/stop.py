"""Asks a run to stop, and listens for such requests: a file in the run's folder, signals, the launcher."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from echox.files import LARGEST_JSON, parse_json, read_regular, write_atomically

STOP_FILE = "stop.json"
POLL_S = 0.5
_NO_REASON = "asked to stop"


def request_stop(run_folder: Path, why: str) -> None:
    """Ask the run in a folder to finish its step, save and end; anyone who can write there may."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run_folder / STOP_FILE, request(why))


def clear_stop(run_folder: Path) -> None:
    """Withdraw a request; whoever starts a run does so first, for an old request is not meant for the new run."""
    (run_folder / STOP_FILE).unlink(missing_ok=True)


def read_stop(run_folder: Path) -> str | None:
    """Why the run was asked to stop, or None."""
    try:
        return reason_in(read_regular(run_folder / STOP_FILE, LARGEST_JSON))
    except (PermissionError, ValueError):
        return _NO_REASON
    except OSError:
        return None  # there is none, or the storage does not answer now and is asked again


def reason_in(request: bytes) -> str:
    """Why a run is asked to stop, from the contents of a request, which may be written by hand."""
    try:
        return str(parse_json(request)["why"])
    except (ValueError, KeyError, TypeError):
        return _NO_REASON


def request(why: str) -> str:
    """The contents of a request."""
    return json.dumps({"why": why, "time": time.time()})


class StopListener:
    """Watches for requests in a thread, so that a slow disk or launcher never holds a step.

    Args:
        run_folder: where `request_stop` leaves its file; None does not look there (every rank but the first).
        ask: further places to look, each returning why, or None.
    """

    def __init__(self, run_folder: Path | None, *ask: Callable[[], str | None]) -> None:
        self.why: str | None = None
        self._ask = [*(() if run_folder is None else (lambda: read_stop(run_folder),)), *ask]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-listener", daemon=True)
        self._thread.start()

    def request(self, why: str) -> None:
        """Note a request that arrived in this process."""
        self.why = self.why or why

    def _watch(self) -> None:
        while self.why is None:
            for ask in self._ask:
                if (why := ask()) is not None:
                    self.request(why)
            if self._closed.wait(POLL_S):
                return

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=2 * POLL_S)


@contextmanager
def signals_stop(listener: StopListener) -> Iterator[None]:
    """Take SIGTERM and SIGINT as a request; a second one ends the process the usual way.

    In threads other than the main one, and in workers of a launcher that keeps signals to itself, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def heard(number: int, frame: object) -> None:
        if listener.why is not None:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        listener.request(f"{signal.Signals(number).name}")

    for number in before:
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
