"""Reads files of rows, JSON lines and arrays, plain or gzip'd, a row at a time and without trusting any."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from echox.errors import DataError

LONGEST = 4 << 20
"""Bytes of a row."""

Row = Mapping[str, Any]


class Unusable(Exception):
    """A row that cannot become an utterance, and why."""


Line = tuple[str, Row | Unusable]
"""Where a row is, in words, and the row or what is wrong with it."""

NAMES = {
    "text": ("transcription", "transcript", "sentence", "normalized_text", "question_text", "question", "source_text"),
    "answer_text": ("answer", "target_text", "response"),
    "audio": ("audio_filepath", "audio_file", "file_name", "question_audio", "source_wav"),
    "answer_audio": ("answer_file_name", "target_wav"),
    "speaker": ("speaker_id", "client_id"),
    "id": ("key", "utt_id"),
}
"""What tables of others call the fields of a manifest; the first that a row has is taken."""


def renamed(row: Row) -> Row:
    """A row of a table with the field names of a manifest."""
    found = dict(row)
    for own, others in NAMES.items():
        for name in others:
            if not _says(found.get(own)) and _says(found.get(name)):
                found[own] = found.pop(name)
    return {name: value for name, value in found.items() if _says(value)}


def _says(value: Any) -> bool:
    return value is not None and value != ""


def is_zipped(path: Path) -> bool:
    """Whether a file is gzip'd, whatever its name says."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """A file of bytes, unzipped where it is gzip'd."""
    return cast("BinaryIO", gzip.open(path)) if is_zipped(path) else path.open("rb")


def beginning(path: Path, size: int = 1 << 16) -> str:
    """The first characters of a file without a byte order mark; "" where it is not there, damaged, or no text."""
    try:
        with opened(path) as file:
            return file.read(size).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error):
        return ""


def json_rows(path: Path) -> Iterator[Line]:
    """Rows of JSON lines; what is no object is unusable, blank lines are passed over."""
    for number, line in enumerate(_lines(path), 1):
        if isinstance(line, Unusable) or line.strip():
            yield f"line {number} of {path.name}", line if isinstance(line, Unusable) else _row(line)


def array_rows(path: Path) -> Iterator[Line]:
    """Objects of a JSON array, read one after the other: a file need not fit into memory."""
    decoder, utf8, number = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("replace"), 0
    with opened(path) as file, _whole(path):
        text = utf8.decode(file.read(LONGEST).removeprefix(b"\xef\xbb\xbf")).lstrip()[1:]
        while True:
            text = text.lstrip(" \t\r\n,")
            try:
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError) as error:
                more = file.read(LONGEST) if len(text) < 2 * LONGEST else b""
                if more:
                    text += utf8.decode(more)
                    continue
                if text.strip() != "]":
                    yield f"entry {number + 1} of {path.name}", Unusable(f"not JSON from here on: {error}")
                return
            text, number = text[end:], number + 1
            yield f"entry {number} of {path.name}", _object(value)


def expanded(lines: Iterable[Line], rows_of: Callable[[Row], Iterator[Row]]) -> Iterator[Line]:
    """The rows that each of the lines becomes; one of another make than is expected is unusable."""
    for where, line in lines:
        if isinstance(line, Unusable):
            yield where, line
            continue
        try:
            for row in rows_of(line):
                yield where, row
        except Unusable as problem:
            yield where, problem
        except KeyError as error:
            yield where, Unusable(f"it has no {error}")
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            yield where, Unusable(f"damaged: {error}")


def text_lines(path: Path) -> Iterator[tuple[str, str | Unusable]]:
    """Lines of a text file that are not blank, and where each is."""
    for number, line in enumerate(_lines(path), 1):
        text = line if isinstance(line, Unusable) else _decoded(line)
        if isinstance(text, Unusable) or text.strip():
            yield f"line {number} of {path.name}", text


def first_object(rows: Iterable[Line]) -> Row:
    """The first row that is one; empty where none of the first hundred is."""
    for _, row in itertools.islice(rows, 100):
        if not isinstance(row, Unusable):
            return row
    return {}


def _lines(path: Path) -> Iterator[bytes | Unusable]:
    """Lines without a byte order mark before the first; one that is too long is passed over."""
    with opened(path) as file, _whole(path):
        first = True
        while line := file.readline(LONGEST):
            whole = line.endswith(b"\n") or len(line) < LONGEST
            rest = line
            while not whole and rest and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST)
            if whole:
                yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            else:
                yield Unusable(f"longer than {LONGEST >> 20} MiB")
            first = False


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("The gzip file is damaged or cut short", where=str(path), fix="Copy it again.") from error


def _decoded(line: bytes) -> str | Unusable:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return Unusable(f"not UTF-8 at byte {error.start}; convert the file, as by iconv -f LATIN1 -t UTF-8")


def _row(line: bytes) -> Row | Unusable:
    text = _decoded(line)
    if isinstance(text, Unusable):
        return text
    try:
        return _object(json.loads(text))
    except RecursionError:
        return Unusable("nested too deeply")
    except ValueError as error:
        return Unusable(f"not JSON: {error}")


def _object(value: Any) -> Row | Unusable:
    return value if isinstance(value, dict) else Unusable("not a JSON object")
