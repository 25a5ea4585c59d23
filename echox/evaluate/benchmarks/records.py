"""Keeps answers on disk as JSON lines: a header with their identity, then a line an answer, forced to disk one by one.

| file of `<benchmark>/` | content |
|---|---|
| `greedy-0.jsonl`, `release-17.jsonl` | the answers of one process, by decoding and seed |
| `greedy-0-1of4.jsonl` | those of the second of four processes |

Whoever reads takes all files of a decoding, so nothing has to be merged. A process that is killed leaves at most a line
without its end; the next one cuts that off and goes on, and the file becomes what it would have been.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from echox.errors import DataError
from echox.evaluate.quality import PARTS
from echox.files import fsync, own_file, parse_json, read_lines
from echox.responses.identity import differences

VERSION = 1
_FIX = "give another --out, or remove the folder"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of one question.

    Attributes:
        number: of the question in the benchmark.
        text: the model's own text.
        heard: the judge's transcript of its speech; empty where nothing is heard.
        cascade_heard: the same when the frozen T2C teacher speaks that text.
        units: what was said, as speech units.
        seconds: of the speech.
        failed: segments that failed, see `SpokenAnswer`.
        quality: how it sounds, in the order of `PARTS`; None where that was not rated, or nothing is said.
    """

    number: int
    text: str
    heard: str
    cascade_heard: str
    units: list[int]
    seconds: float
    failed: int
    quality: list[float] | None = None


_TYPES: dict[str, Any] = {
    **dict.fromkeys(("number", "failed"), int),
    **dict.fromkeys(("text", "heard", "cascade_heard"), str),
    "units": list,
    "seconds": int | float,
    "quality": list | None,
}


@dataclass(frozen=True)
class Part:
    """Which of several processes this one is.

    Attributes:
        index: from 0.
        count: of all.
    """

    index: int = 0
    count: int = 1

    def file(self, stem: str) -> str:
        """Name of the file it adds to."""
        return f"{stem}.jsonl" if self.count == 1 else f"{stem}-{self.index}of{self.count}.jsonl"


def read_answers(folder: Path, stem: str, identity: Mapping[str, Any]) -> dict[int, Answered]:
    """The answers of a decoding that all processes have written so far, by the number of their question.

    Raises:
        DataError: a file holds answers of another identity, or something else.
    """
    found: dict[int, Answered] = {}
    for path in [folder / f"{stem}.jsonl", *sorted(folder.glob(f"{stem}-*of*.jsonl"))]:
        if path.exists() or path.is_symlink():
            for row in _rows(path, identity):
                found.setdefault(row.number, row)
    return found


class Writer:
    """Adds answers to the file of one process."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, row: Answered) -> None:
        """Write an answer and force it to disk; what is written is never changed again."""
        self._line(asdict(row))

    def _line(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writing(folder: Path, name: str, identity: Mapping[str, Any]) -> Iterator[Writer]:
    """Open the file of one process to add to, without what a killed process has left of a line.

    Raises:
        DataError: another process has it open, or it cannot be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = own_file(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        said = error.strerror or str(error)
        raise DataError(f"answers cannot be written: {said}", where=str(path), fix="give another --out") from error
    with open(descriptor, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait for it, or share the work by --shard"
            raise DataError("another process is answering this benchmark", where=str(path), fix=fix) from error
        writer = Writer(file)
        if not _cut_to_whole_lines(file):
            writer._line({"version": VERSION, "identity": identity})
            fsync(folder)
        yield writer


def _cut_to_whole_lines(file: IO[bytes]) -> int:
    """Cut off a line without an end; the bytes that are left."""
    size = whole = file.seek(0, os.SEEK_END)
    while whole:
        start = max(0, whole - 65536)
        file.seek(start)
        at = file.read(whole - start).rfind(b"\n")
        if at >= 0:
            whole = start + at + 1
            break
        whole = start
    if whole < size:
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return whole


def _rows(path: Path, identity: Mapping[str, Any]) -> Iterator[Answered]:
    try:
        lines = _whole_lines(path)
        header = next(lines, None)
        if header is None:  # killed before it had one
            return
        known = parse_json(header)
        if not isinstance(known, dict) or known.get("version") != VERSION or not isinstance(known["identity"], dict):
            raise ValueError("its first line is not that of answers")
        other = differences(known["identity"], identity)
        if other:
            raise DataError(f"these are answers of another {other}", where=str(path), fix=_FIX)
        for line in lines:
            yield _row(parse_json(line))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"these are no answers to a benchmark: {error}", where=str(path), fix=_FIX) from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines that have an end."""
    if path.is_symlink():
        raise ValueError("it is a link")
    with open(path, "rb", opener=own_file) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 1))
        cut = size > 0 and file.read(1) != b"\n"
    previous: bytes | None = None
    for line in read_lines(path):
        if previous is not None:
            yield previous
        previous = line
    if previous is not None and not cut:
        yield previous


def _row(content: Any) -> Answered:
    row = Answered(**content)
    for each in fields(row):
        value = getattr(row, each.name)
        if not isinstance(value, _TYPES[each.name]) or isinstance(value, bool):
            raise TypeError(f"{each.name} is a {type(value).__name__}")
    if not all(type(unit) is int and 0 <= unit < 1 << 16 for unit in row.units):
        raise ValueError("a unit is none")
    opinions = [] if row.quality is None else row.quality
    if row.quality is not None and len(opinions) != len(PARTS):
        raise ValueError("a quality is none")
    if not all(type(each) is float and math.isfinite(each) for each in opinions):
        raise ValueError("a quality is none")
    if not (math.isfinite(row.seconds) and row.seconds >= 0 and row.failed >= 0 and row.number >= 0):
        raise ValueError("a number is out of its range")
    return row
