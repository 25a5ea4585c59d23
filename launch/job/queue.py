"""Lets a queued run of higher priority go first: what waits on a cluster is known to all that wait there.

Ray gives free room to whoever asks first. So each queued run leaves a note on the cluster, and asks for room only while
no note of a higher priority is alive. A run that trains is never stopped for another.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from launch.events import JobLog

BEAT_S = 10.0
"""How often a note is changed; a driver that was killed changes none."""
DEAD_S = 60.0
"""A note without a change for so long, by the reader's clock, has lost its run."""
SAY_S = 60.0
_SPACE = "echox-queue"


class Board(Protocol):
    """Where notes hang."""

    def put(self, run: str, note: str) -> None:
        """Leave or change a note."""
        ...

    def remove(self, run: str) -> None:
        """Take a note away, if there is one."""
        ...

    def notes(self) -> Mapping[str, str]:
        """All of them, by run."""
        ...


class ClusterBoard:
    """The key-value store of the cluster's head; notes are lost with it, as are the jobs."""

    def put(self, run: str, note: str) -> None:
        """See `Board`."""
        self._store()._internal_kv_put(run, note, overwrite=True, namespace=_SPACE)

    def remove(self, run: str) -> None:
        """See `Board`."""
        self._store()._internal_kv_del(run, namespace=_SPACE)

    def notes(self) -> Mapping[str, str]:
        """See `Board`."""
        store = self._store()
        keys = store._internal_kv_list("", namespace=_SPACE)
        found = {key.decode(): store._internal_kv_get(key, namespace=_SPACE) for key in keys}
        return {run: note.decode() for run, note in found.items() if note is not None}

    def _store(self) -> Any:
        from ray.experimental import internal_kv

        return internal_kv


class Queue:
    """One run's place among those that wait; made by the driver, used in Ray Train's controller.

    Args:
        run_folder: of the run, whose name is its folder's.
        priority: of the recipe.
        limit_s: after so long it asks for room whoever waits; None for never.
        board: where notes hang.
    """

    def __init__(self, run_folder: Path, priority: int, limit_s: float | None, board: Board) -> None:
        self._run_folder, self._priority, self._limit_s, self._board = run_folder, priority, limit_s, board
        self._since: float | None = None
        self._said = 0.0
        self._seen: dict[str, tuple[str, float]] = {}
        self._left: Callable[[], None] | None = None

    def waits(self) -> bool:
        """Whether another goes first; says so now and then. The run has a note from here on, until `leave`."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self._left = _beating(self._board, self._run_folder.name, self._priority)
        if self._limit_s is not None and now - self._since > self._limit_s:
            return False
        first = self._first(now)
        if first is not None and now - self._said > SAY_S:
            self._said = now
            JobLog(self._run_folder)("waiting", need=f"run {first} goes first", waited_s=round(now - self._since))
        return first is not None

    def leave(self) -> None:
        """Take the note away: the run has its room, or ends."""
        if self._left is not None:
            self._left()
        self._since = self._left = None

    def _first(self, now: float) -> str | None:
        """A living note of higher priority."""
        ahead = None
        for run, text in self._board.notes().items():
            if self._seen.get(run, ("", 0.0))[0] != text:
                self._seen[run] = (text, now)
            priority = _priority(text)
            if run != self._run_folder.name and priority > self._priority and now - self._seen[run][1] < DEAD_S:
                ahead = f"{run} (priority {priority})"
        return ahead


def _beating(board: Board, run: str, priority: int) -> Callable[[], None]:
    """Keep a note alive in a thread; returns what ends that."""
    ended = threading.Event()

    def note() -> None:
        board.put(run, json.dumps({"priority": priority, "beat": uuid.uuid4().hex}))

    def beat() -> None:
        while not ended.wait(BEAT_S):
            note()

    def end() -> None:
        ended.set()
        thread.join()
        board.remove(run)

    note()
    thread = threading.Thread(target=beat, name="queue", daemon=True)
    thread.start()
    return end


def _priority(note: str) -> int:
    try:
        return int(json.loads(note)["priority"])
    except (ValueError, KeyError, TypeError):
        return 0
