"""Journals what goes from training to the tracking server: JSON lines beside the run, each removed when delivered.

Everything a process records goes into its own file first and is sent from there, so a killed process, a server that is
away and one that is slow all end the same way: the next process sends the rest from where the last one stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echox.files import LARGEST_JSON, LARGEST_LINE, open_regular, own_file, parse_json, read_regular, read_text

Operation = dict[str, Any]
"""`kind` is metrics, params, tags, artifact, begin or end; the rest is what `Delivery.send` reads. JSON types."""

CHUNK_BYTES = 1 << 20
ROTATE_BYTES = 4 << 20
_LATER = ".later"


class Spool:
    """One process's journal in the run's spool folder. One thread appends, another reads and confirms.

    Args:
        folder: spool folder of the run.
        writer: name of the process's role, such as rank0; a later process of that role takes over what is left.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        self._folder = folder
        self._writer = writer
        self.path = self._new_path()

    def append(self, operations: Sequence[Operation]) -> None:
        """Keep operations; they have reached the operating system on return, so a killed process loses none.

        Raises:
            OSError: the folder cannot be written; nothing of the operations is kept.
        """
        self._rotate()
        lines = "".join(json.dumps(operation) + "\n" for operation in operations).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Opened again each time: a file that another process delivered and removed meanwhile begins again.
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(lines)
                if written != len(lines):
                    raise OSError(f"{self.path} took {written} of {len(lines)} bytes")
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # a line cut short on a full disk must not spoil the next one
                raise

    def _rotate(self) -> None:
        """Begin a new file when the present one is long and wholly delivered."""
        if sent_bytes(self.path) >= ROTATE_BYTES and not undelivered(self.path):
            old, self.path = self.path, self._new_path()
            remove(old)

    def inherited(self) -> list[Path]:
        """What earlier processes of this role left, oldest first."""
        return [path for path in pending(self._folder) if path != self.path and _writer_of(path) == self._writer]

    def _new_path(self) -> Path:
        return self._folder / f"{time.time_ns():020d}~{self._writer}~{os.getpid()}.jsonl"


def pending(folder: Path) -> list[Path]:
    """Journals that wait for delivery, oldest first."""
    return sorted(folder.glob("*~*.jsonl")) if folder.is_dir() else []


def read(path: Path) -> tuple[list[Operation], int]:
    """The next undelivered operations of a journal, and the offset to `confirm` once they are sent.

    At most about a megabyte, so memory stays small however long the server was away. Without operations, all is sent;
    a last line cut short by a crash and lines that are no JSON are passed over.
    """
    start = sent_bytes(path)
    try:
        with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            file.seek(start)
            block = file.read(CHUNK_BYTES)
            if not block.endswith(b"\n"):
                block += file.readline(LARGEST_LINE)
    except FileNotFoundError:
        return [], start
    whole = block[: block.rfind(b"\n") + 1]
    return _operations(whole), start + len(whole)


def confirm(path: Path, offset: int) -> None:
    """Note that everything before `offset` was delivered."""
    mark = _mark(path)
    partial = mark.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):  # the folder of the run may have been moved aside
        partial.write_text(str(offset))
        partial.replace(mark)


def sent_bytes(path: Path) -> int:
    """How much of a journal was delivered. A mark beyond the end belonged to a file that was removed."""
    try:
        sent = int(read_text(_mark(path), 100))
        return sent if 0 <= sent <= path.stat().st_size else 0
    except (OSError, ValueError):
        return 0


def undelivered(path: Path) -> bool:
    """Whether a journal holds whole lines that were not sent."""
    return bool(read(path)[0])


def remove(path: Path) -> None:
    """Remove a delivered journal, and the folder with its last one."""
    for file in (path, _mark(path)):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def keep_refused(folder: Path, operation: Operation) -> None:
    """Put aside, in `refused.jsonl`, what the server will never take."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "refused.jsonl", "a", opener=own_file) as file:
        file.write(json.dumps(operation) + "\n")


def postpone(folder: Path, operation: Operation) -> None:
    """Put an artifact aside that its store did not take now, in a file of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _own_later(), "a", opener=own_file) as file:
        file.write(json.dumps(operation) + "\n")


def postponed(folder: Path, *, of_all: bool) -> list[Path]:
    """Files of artifacts that were put aside: by this process, or by every process of the run."""
    return sorted(folder.glob(f"*{_LATER}" if of_all else _own_later())) if folder.is_dir() else []


def _own_later() -> str:
    return f"{socket.gethostname()}~{os.getpid()}{_LATER}"


def read_postponed(path: Path) -> list[Operation]:
    """What such a file holds."""
    return _operations(read_regular(path, LARGEST_JSON))


def _operations(lines: bytes) -> list[Operation]:
    """The operations of whole lines; one that is no JSON is passed over."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            operation = parse_json(line)
            if isinstance(operation, dict):
                found.append(operation)
    return found


def _mark(path: Path) -> Path:
    return path.with_suffix(".sent")


def _writer_of(path: Path) -> str:
    return path.name.split("~")[1]
