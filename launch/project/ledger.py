"""Keeps what was done of a project, and which step is being done; one process at a time does its steps."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from echox.errors import LaunchError
from echox.files import own_file, read_record, write_atomically

STATE = ".steps.json"
"""Of a project: what each step was last done with, and how long it took."""
AT_WORK = ".running.json"
"""The step that is being done; whoever does it holds a lock on the file, which a kill takes along."""

State = Literal["done", "running", "left"]


@dataclass(frozen=True)
class Done:
    """A step that ended well.

    Attributes:
        key: hash of the command, of its input and of the steps before it.
        seconds: that it took.
    """

    key: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """A step as it stands.

    Attributes:
        name: of it.
        state: of it.
        seconds: that it took, or has taken so far; None where it is left.
    """

    name: str
    state: State
    seconds: float | None = None


def read_done(folder: Path) -> dict[str, Done]:
    """What was done of a project; what is no such record was not."""
    found: dict[str, Done] = {}
    for name, each in read_record(folder, STATE).items():
        with contextlib.suppress(TypeError, ValueError, KeyError):
            found[name] = Done(str(each["key"]), float(each["seconds"]))
    return found


def write_done(folder: Path, done: Mapping[str, Done]) -> None:
    """Keep what was done."""
    content = {name: asdict(each) for name, each in done.items()}
    write_atomically(folder / STATE, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class Worker:
    """The process that does the steps."""

    descriptor: int

    def begins(self, name: str) -> None:
        """Say which step is being done."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps({"step": name, "since": time.time()}).encode(), 0)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Worker]:
    """Be the one process that does the steps of a project.

    Raises:
        LaunchError: another one does.
    """
    descriptor = own_file(str(folder / AT_WORK), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "wait for it, or stop it; --status shows where it is"
            raise LaunchError("the project is being run already", where=str(folder), fix=fix) from error
        os.ftruncate(descriptor, 0)
        yield Worker(descriptor)
    finally:
        os.close(descriptor)


def at_work(folder: Path) -> tuple[str, float] | None:
    """The step that is being done and the seconds it has taken; None where nobody is at work."""
    try:
        descriptor = own_file(str(folder / AT_WORK), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        record = read_record(folder, AT_WORK)
        with contextlib.suppress(TypeError, ValueError, KeyError):
            return str(record["step"]), max(0.0, time.time() - float(record["since"]))
    finally:
        os.close(descriptor)
    return None


def table(rows: Sequence[Row]) -> str:
    """Steps with state and seconds, and the sum of what is done."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:<{width}}  {row.state:<7}  {'' if row.seconds is None else f'{row.seconds:,.0f}':>7}".rstrip()
        for row in rows
    ]
    total = sum(row.seconds or 0.0 for row in rows)
    left = sum(row.state == "left" for row in rows)
    return "\n".join([f"{'step':<{width}}  {'state':<7}  seconds", *lines, f"{total:,.0f} s in all, {left} left"])
