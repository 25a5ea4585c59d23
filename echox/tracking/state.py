"""Keeps a run folder's record of its MLflow run: ids, the process that owns it, heartbeats. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from echox.files import read_record, read_text, write_atomically

STATE_FILE = "mlflow.json"
ATTEMPT_FILE = "mlflow-attempt.json"
ALIVE_FILE = "mlflow-alive"
SPOOL_FOLDER = "mlflow-spool"
STOP_FILE = "stop.json"
"""The engine's: there when the run was asked to stop."""
BEAT_S = 10.0
"""How often the watcher touches the heartbeat file of a run whose owner lives."""

_TEXTS = ("name", "experiment", "parent", "artifacts", "token", "uri", "status")
_TYPES: dict[str, Any] = {
    "run_id": str | None,
    "parent_id": str | None,
    "attempt": int,
    "owner": dict | None,
    "started": int | float | None,
    "ended": int | float | None,
    "closed": bool,
}
_lock = threading.Lock()


@dataclass(frozen=True)
class Process:
    """One process of one machine; a later process with the same number is another one.

    Attributes:
        host: name of the machine.
        pid: process id there.
        start: when it started, in clock ticks since the machine did.
        space: the set of numbers `pid` is from; containers of one machine each have their own.
    """

    host: str
    pid: int
    start: int
    space: str = ""

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or 0, _space())

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Self | None:
        """The process of a record, or None where there is none."""
        try:
            found = cls(**record) if record else None
        except TypeError:
            return None
        if found is None or not all(isinstance(value, int) for value in (found.pid, found.start)):
            return None
        return found

    def record(self) -> dict[str, Any]:
        """JSON types that `of` reads."""
        return asdict(self)

    def here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    def alive(self) -> bool:
        """Whether it runs on this machine; one that has died and was not yet reaped does not."""
        return self.here() and _start_of(self.pid) == self.start


def read_state(run_folder: Path) -> dict[str, Any]:
    """Contents of `mlflow.json`, empty where there is none.

    `name`, `experiment`, `parent`, `artifacts`, `tags`, `token`, `uri`, `run_id`, `parent_id`, `attempt` describe the
    run; `owner`, `status` (RUNNING until the owner ends it), `ended` (seconds), `closed` (the server knows) its life.
    """
    return {name: value for name, value in read_record(run_folder, STATE_FILE).items() if _fits(name, value)}


def _fits(name: str, value: Any) -> bool:
    """Whether a value is of the type that its reader expects; the folder may be someone else's."""
    if name in _TEXTS:
        return isinstance(value, str)
    if name == "tags":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return isinstance(value, _TYPES.get(name, object))


def update_state(run_folder: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of `mlflow.json` and return all; one process at a time writes it, the owner while it lives."""
    with _lock:
        state = {**read_state(run_folder), **changes}
        write_atomically(run_folder / STATE_FILE, json.dumps(state, indent=1, default=str) + "\n")
    return state


def end_state(run_folder: Path, status: str) -> None:
    """Note how the owner ended the run, whether or not the server can be told."""
    update_state(run_folder, status=status, ended=time.time())


def unfinished(state: Mapping[str, Any]) -> bool:
    """Whether the server may still show the run as RUNNING, or lack a part of it."""
    return bool(state) and not state.get("closed", False)


def stop_requested(run_folder: Path) -> bool:
    """Whether the run was asked to stop."""
    return (run_folder / STOP_FILE).exists()


def fate(run_folder: Path, state: Mapping[str, Any]) -> str:
    """How a run ends whose owner is gone: as the owner said, else KILLED after a request to stop, or FAILED."""
    said = str(state.get("status", "RUNNING"))
    if said != "RUNNING":
        return said
    return "KILLED" if stop_requested(run_folder) else "FAILED"


def beat(run_folder: Path) -> None:
    """Leave a heartbeat for processes of other machines: each is another word, for their clocks may differ."""
    with contextlib.suppress(OSError):
        (run_folder / ALIVE_FILE).write_text(uuid.uuid4().hex)


def last_beat(run_folder: Path) -> str:
    """The last heartbeat's word; empty if there never was one."""
    try:
        return read_text(run_folder / ALIVE_FILE, 1000)
    except (OSError, ValueError):
        return ""


def last_sign(run_folder: Path) -> float:
    """When a file that shows the run's activity last changed, in seconds."""
    return max(_mtime(run_folder / name) for name in ("progress.json", ALIVE_FILE, STATE_FILE))


def worker_group() -> str:
    """What the processes of one start of the workers have in common and no other start has: where they met."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def announce_attempt(run_folder: Path, attempt: int) -> None:
    """Tell the trackers of other nodes which attempt theirs is."""
    write_atomically(run_folder / ATTEMPT_FILE, json.dumps({"attempt": attempt, "gang": worker_group()}))


def announced_attempt(run_folder: Path) -> int | None:
    """The attempt of this process's group of workers, if its first rank has said so."""
    try:
        record = read_record(run_folder, ATTEMPT_FILE)
        return int(record["attempt"]) if record["gang"] == worker_group() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def counted_attempts(run_folder: Path) -> int:
    """How many attempts the engine has counted in a run's folder."""
    try:
        return int(read_text(run_folder / "attempt", 100))
    except (OSError, ValueError):
        return 0


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
