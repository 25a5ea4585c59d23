"""Parses the headers of a tar shard without a tar library, so that no damage passes for the end of the archive.

A shard is a plain, uncompressed tar in WebDataset's naming. A member `dir/key.ext` belongs to the sample `dir/key`; the
extension starts at the first dot of the file name. Long names may be written the PAX or the GNU way. What is refused is
refused with the shard, the byte offset and the reason.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from echox.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

BLOCK = 512
LARGEST_SAMPLE = 2**32 - 1
"""Bytes of one sample, headers included, that the catalogue can address."""

_ZEROS = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = frozenset(b"0\x007")
_DIRECTORY = ord("5")
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME = ord("x"), ord("g"), ord("L")
_EXTENSION = re.compile(r"(?:[a-z][^./]*\.)*[^./]+")
_REPACK = "write the shard again"


class ShardDefect(DataError):
    """Damage of one shard, found at a byte offset."""

    def __init__(self, what: str, *, where: str = "", fix: str = _REPACK) -> None:
        super().__init__(what, where=where, fix=fix)


def defect(shard: str | Path, offset: int, reason: str, fix: str = _REPACK) -> ShardDefect:
    """The error for something wrong at a byte of a shard."""
    return ShardDefect(f"{Path(shard).name}, byte {offset}: {reason}", where=str(shard), fix=fix)


class Members(NamedTuple):
    """The files of a shard, in order; row m is one file.

    Attributes:
        names: path in the tar.
        starts: where its first header begins, with any header that only carries its long name; [M].
        data: where its bytes begin; [M].
        sizes: its bytes, without padding; [M].
        end: where the padding of the last one ends.
    """

    names: list[str]
    starts: Ints
    data: Ints
    sizes: Ints
    end: int


@dataclass(frozen=True)
class Spans:
    """The samples of a shard, in order; row n is one sample.

    Attributes:
        keys: sample names.
        extensions: of each sample's members, in the order of the tar.
        starts: first byte, that of its first header; [N + 1], the last entry being the end of the last sample.
        firsts: its first row in `members`; [N + 1].
        members: the files.
    """

    keys: list[str]
    extensions: list[tuple[str, ...]]
    starts: Ints
    firsts: Ints
    members: Members


@contextmanager
def mapped(shard: Path) -> Iterator[mmap.mmap]:
    """A shard's bytes, mapped read-only.

    Raises:
        ShardDefect: an empty file, or a compressed one.
        DataError: it cannot be opened.
    """
    try:
        file = shard.open("rb")
    except OSError as error:
        raise DataError(
            f"Cannot open the shard: {error.strerror}", where=str(shard), fix="repair the folder"
        ) from error
    with file:
        head = file.read(8)
        if not head:
            raise defect(shard, 0, "the file is empty; even a tar without samples has two zero blocks")
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise defect(shard, 0, f"the tar is compressed with {name}, and has no offsets", "decompress it")
        # Not closed here: an error on its way out still holds views; the map goes with the last of them.
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def walk(data: mmap.mmap | bytes, shard: str | Path) -> Spans:
    """Find every sample of a shard.

    Args:
        data: the whole shard.
        shard: its name, for errors.

    Raises:
        ShardDefect: a header whose checksum is wrong, a cut member, a missing end, bytes after the end, a link or other
            special file, a name without extension or with a dot in its key, a member twice, a key that comes back.
    """
    return _samples(_members(data, shard), shard)


def _members(data: mmap.mmap | bytes, shard: str | Path) -> Members:
    headers, starts, sizes, stop = _headers(data, shard)
    bad = _first_bad_checksum(headers)
    if bad is not None:
        raise defect(shard, starts[bad], "the checksum of a tar header is wrong")
    if stop is not None:
        raise stop
    names: list[str] = []
    rows: list[tuple[int, int, int]] = []
    long_name, begins = "", -1
    for header, start, size in zip(headers, starts, sizes, strict=True):
        kind = header[156]
        if kind in _REGULAR:
            names.append(long_name or _name(header, start, shard))
            rows.append((start if begins < 0 else begins, start + BLOCK, size))
        elif kind in (_PAX, _GNU_LONG_NAME):
            carried = _carried_name(data[start + BLOCK : start + BLOCK + size], kind, start, shard)
            long_name, begins = carried or long_name, start if begins < 0 else begins
            continue
        elif kind not in (_DIRECTORY, _PAX_GLOBAL):
            raise defect(shard, start, f"{_name(header, start, shard)} is a link or special file, type {chr(kind)!r}")
        long_name, begins = "", -1
    where, data_at, bytes_of = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    last = rows[-1] if rows else (0, 0, 0)
    return Members(names, where, data_at, bytes_of, last[1] + _padded(last[2]))


def _headers(
    data: mmap.mmap | bytes, shard: str | Path
) -> tuple[list[bytes], list[int], list[int], ShardDefect | None]:
    """Headers, their offsets, the sizes they name, and what stopped the walk where that was not the end.

    The sizes are trusted for now: a wrong one gives wrong offsets, but the header it stands in then fails its checksum.
    """
    headers: list[bytes] = []
    starts: list[int] = []
    sizes: list[int] = []
    at, total = 0, len(data)
    while True:
        header = data[at : at + BLOCK]
        if header == _ZEROS:
            return headers, starts, sizes, _check_end(data, at, shard)
        if len(header) < BLOCK:
            return headers, starts, sizes, _cut(headers, starts, sizes, at, total, shard)
        headers.append(header)
        starts.append(at)
        try:
            size = int(header[124:135], 8)
        except ValueError:
            size = _number(header[124:136])
        sizes.append(size)
        if size < 0 or size > LARGEST_SAMPLE:
            return headers, starts, sizes, defect(shard, at, "the size in a tar header is no number below 4 GiB")
        at += BLOCK + (size + 511 & -512)


def _check_end(data: mmap.mmap | bytes, at: int, shard: str | Path) -> ShardDefect | None:
    second = data[at + BLOCK : at + 2 * BLOCK]
    if len(second) < BLOCK:
        return defect(shard, at, "the tar ends after one zero block of two; its end is missing")
    if second != _ZEROS:
        return defect(shard, at, "a lone zero block stands between the members; readers stop here and lose the rest")
    rest = np.frombuffer(data, dtype=np.uint8, offset=at + 2 * BLOCK)
    if rest.any():
        return defect(shard, at + 2 * BLOCK + int((rest != 0).argmax()), "there are bytes after the end of the tar")
    return None


def _cut(
    headers: list[bytes], starts: list[int], sizes: list[int], at: int, total: int, shard: str | Path
) -> ShardDefect:
    if starts and starts[-1] + BLOCK + sizes[-1] > total:
        name = headers[-1][:100].split(b"\0", 1)[0].decode(errors="replace")
        missing = starts[-1] + BLOCK + sizes[-1] - total
        return defect(shard, starts[-1], f"the shard is cut: {missing} bytes of {name} are missing")
    return defect(shard, min(at, total), "the tar has no end: its two zero blocks are missing")


def _first_bad_checksum(headers: list[bytes]) -> int | None:
    """Row of the first header whose sum, with the checksum's own field read as blanks, is not the one written."""
    blocks = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    sums = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32
    digits = blocks[:, 148:154].astype(np.int64) - 48
    written = digits @ (8 ** np.arange(5, -1, -1, dtype=np.int64))
    plain = ((digits >= 0) & (digits < 8)).all(axis=1)
    for row in np.flatnonzero(~(plain & (written == sums))).tolist():
        value = _number(headers[row][148:156])
        # Historic tars summed signed characters.
        signed = int(sums[row]) - 256 * int((blocks[row] > 127).sum())
        if value not in (int(sums[row]), signed):
            return int(row)
    return None


def _number(field: bytes) -> int:
    """A numeric header field: octal digits, or GNU's binary form; -1 where it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _padded(size: int) -> int:
    return size + 511 & -512


def _name(header: bytes, start: int, shard: str | Path) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name, start, shard)


def _carried_name(content: bytes, kind: int, start: int, shard: str | Path) -> str:
    """The name that a PAX or GNU header holds for the member after it; empty where it says other things."""
    if kind == _GNU_LONG_NAME:
        return _text(content.rstrip(b"\0"), start, shard)
    name = ""
    while content:
        digits, _, rest = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        field, _, value = rest[: length - len(digits) - 2].partition(b"=")
        if length < len(digits) + 3 or length > len(content) or content[length - 1 : length] != b"\n":
            raise defect(shard, start, "a PAX header cannot be read")
        if field == b"path":
            name = _text(value, start, shard)
        elif field == b"size" or field.startswith(b"GNU.sparse"):
            raise defect(shard, start, f"a PAX header sets {field.decode()}: sparse and huge files are not supported")
        content = content[length:]
    return name


def _text(name: bytes, start: int, shard: str | Path) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise defect(shard, start, f"the member name {name!r} is not UTF-8") from None


def _samples(members: Members, shard: str | Path) -> Spans:
    keys: list[str] = []
    layouts: list[tuple[str, ...]] = []
    firsts: list[int] = []
    seen: set[str] = set()
    current: dict[str, None] = {}
    previous = None
    known: dict[str, bool] = {}
    for row, name in enumerate(members.names):
        dot = name.find(".", name.rfind("/") + 1)
        key, extension = name[:dot], name[dot + 1 :].lower()
        if dot < 0 or not key or key.endswith("/"):
            raise defect(
                shard, int(members.starts[row]), f"{name} has no key or no extension", "name members KEY.EXTENSION"
            )
        if not (known.get(extension) or known.setdefault(extension, bool(_EXTENSION.fullmatch(extension)))):
            raise defect(
                shard,
                int(members.starts[row]),
                f"the key of {name} has a dot: it would be read as member {extension} of sample {key}",
                "write - or _ in place of dots in keys",
            )
        if key != previous:
            if key in seen:
                reason = f"sample {key} comes back after others: its members are interleaved, or the key is used twice"
                raise defect(shard, int(members.starts[row]), reason, "put the members of a sample side by side")
            if previous is not None:
                layouts.append(tuple(current))
            seen.add(key)
            keys.append(key)
            firsts.append(row)
            previous, current = key, {}
        if extension in current:
            raise defect(shard, int(members.starts[row]), f"sample {key} has member {extension} twice")
        current[extension] = None
    if previous is not None:
        layouts.append(tuple(current))
    starts = np.append(members.starts[firsts], members.end) if firsts else np.zeros(1, dtype=np.int64)
    return Spans(keys, layouts, starts, np.append(np.array(firsts, dtype=np.int64), len(members.names)), members)
