"""Writes a dataset's catalogue once and maps it into memory: the place, lengths and checksum of every sample, packed.

File `dataset.catalogue`, little-endian: magic, version, length and XXH3-64 of a JSON header; the header lists segments
with offset, length and XXH3-64 each; segments start at multiples of 64 bytes. So the header's hash stands for the whole
file, and `dataset.json` beside it holds that hash.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest

from echox.errors import DataError
from echox.files import parse_json, read_regular
from echox.stream.format.scan import MEMBER, RECORD

if TYPE_CHECKING:
    from numpy.typing import NDArray

DATASET_NAME = "dataset.json"
LARGEST_LISTING = 64 << 20
"""Bytes of `dataset.json`, with a line a shard."""
CATALOGUE_NAME = "dataset.catalogue"
ELSEWHERE = re.compile(r"(https?|s3a?|gcs|gs|az|abfs)://[^:|]+(:\d+)?[^:|]*")
"""Where `dataset.json` may say that the shards are: it comes from whoever made the dataset."""
MAGIC = b"ECHOXCAT"
VERSION = 1
ALIGN = 64
PREAMBLE = struct.Struct("<8sII16s")
"""Magic, version, length of the header, hexadecimal XXH3-64 of the header."""
SHARD = np.dtype([("bytes", "<u8"), ("first", "<u8"), ("name", "<u8"), ("sha256", "V32")])
"""One shard: size of its file, number of its first sample, where its name begins, hash."""

_ONCE_OPENED = ("shards", "shard_names", "records", "tasks", "speakers", "speaker_names")
"""Segments that are compared with their hashes when a catalogue is opened."""
_LAST_OFFSET = (1 << 62) - 1
_CHECKED_AT_ONCE = 1 << 20
"""Samples, of 140 bytes each, that are looked through when a catalogue is opened."""
_OFFSET, _FIRST, _LAYOUT = (list(RECORD.names or ()).index(name) for name in ("offset", "first", "layout"))


class Catalogue:
    """All samples of one dataset, numbered in shard order.

    Open one with `Catalogue.open`, or with `open_catalogue` of the store where it may be remote. Opening maps the file
    and checks its header, its shard table, its records, their tasks and speakers; keys and member places are checked by
    `verify`, and by `ShardStore` with every sample it reads.

    Attributes:
        location: folder or URL of the shards.
        fingerprint: SHA-256 over the shards' SHA-256, in order.
        samples: N.
        optional: extensions that a sample may lack.
        sources: what `records["source"]` numbers.
        layouts: what `records["layout"]` numbers: extensions in the order of the tar.
        records: one row a sample, see `echox.stream.format.scan.RECORD`; [N].
    """

    def __init__(self, path: Path, location: str) -> None:
        """Map one catalogue file; use `open`, which also finds it and compares it with its shards."""
        self.location = location
        self._path = path
        try:
            # As a plain array: element access through memmap's own class takes several times as long.
            self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:
            raise _unusable(location, f"the catalogue cannot be read: {error}") from error
        header = self._read_header()
        self._segments: dict[str, dict[str, Any]] = header["segments"]
        self.fingerprint: str = header["fingerprint"]
        self.samples: int = header["samples"]
        self.optional: tuple[str, ...] = tuple(header["optional"])
        self.sources: list[str] = header["sources"]
        self.layouts: list[tuple[str, ...]] = [tuple(layout) for layout in header["layouts"]]
        self._check([name for name in _ONCE_OPENED if name in self._segments])
        self.records: NDArray[Any] = self._table("records", RECORD)
        self._members: NDArray[Any] = self._table("members", MEMBER)
        self._shards: NDArray[Any] = self._table("shards", SHARD)
        self._names = self._segment("keys")
        self._check_places()

    @classmethod
    def open(cls, folder: Path) -> Catalogue:
        """Open the catalogue in a local folder; its shards lie beside it, or where its `dataset.json` says.

        Raises:
            DataError: no catalogue, a damaged one, one of other shards, or a shard missing or not of its size.
        """
        if not folder.is_dir():
            raise DataError("there is no such folder of shards", where=str(folder), fix="correct the path")
        listing, path = folder / DATASET_NAME, folder / CATALOGUE_NAME
        for file in (listing, path):
            if not file.is_file():
                raise _unusable(str(folder), f"there is no {file.name} in the folder of shards")
        try:
            content = read_regular(listing, LARGEST_LISTING)
        except (OSError, ValueError) as error:
            raise _unusable(str(folder), f"{listing.name} cannot be read: {error}") from error
        described = read_listing(content, str(listing))
        shards_at: str = described.get("shards_at", "")
        catalogue = cls(path, shards_at or str(folder))
        catalogue.expect(described["catalogue"])
        if not shards_at:
            catalogue._check_shards(folder)
        return catalogue

    @property
    def digest(self) -> str:
        """Hash of the whole catalogue, 16 hexadecimal digits."""
        return self._digest

    @cached_property
    def shard_names(self) -> Sequence[str]:
        """File name of every shard; [S]."""
        try:
            names = _split(self._segment("shard_names"), self._shards["name"])
        except UnicodeDecodeError as error:
            raise _unusable(self.location, f"the names of its shards are not UTF-8: {error}") from error
        for name in names:
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                raise _unusable(self.location, f"it names a shard {name[:80]!r}, which is no name of a file beside it")
        return names

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Number of each shard's first sample, then N; [S + 1] int64."""
        return np.append(self._shards["first"].astype(np.int64), self.samples)

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Size of every shard's file; [S] int64."""
        return self._shards["bytes"].astype(np.int64)

    def shard_sha256(self, shard: int) -> str:
        """Hash of one shard's file."""
        return bytes(self._shards["sha256"][shard]).hex()

    @cached_property
    def tasks(self) -> NDArray[np.uint8] | None:
        """Own task of every sample, as a place in `TASKS`; [N], or None in a catalogue from before they were noted."""
        return self._segment("tasks") if "tasks" in self._segments else None

    @cached_property
    def speaker_names(self) -> list[str]:
        """What `speakers` numbers; empty where no sample says who speaks its answer."""
        if "speaker_names" not in self._segments:
            return []
        try:
            names = parse_json(self._segment("speaker_names").tobytes())
        except ValueError as error:
            raise _unusable(self.location, f"the names of its speakers cannot be read: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _unusable(self.location, "the names of its speakers are no list of texts")
        return names

    @cached_property
    def speakers(self) -> NDArray[np.uint32]:
        """Who speaks each answer: a place in `speaker_names`, counted from 1; [N].

        0 where nothing says it, which is so of all samples in a catalogue from before it was noted.
        """
        if "speakers" not in self._segments:
            return np.zeros(self.samples, dtype=np.uint32)
        found = self._table("speakers", np.dtype("<u4"))
        if len(found) != self.samples or (len(found) and found.max() > len(self.speaker_names)):
            raise _unusable(self.location, "the catalogue's speakers are not of its samples")
        return found

    def key(self, sample: int) -> str:
        """Name of one sample."""
        start = int(self.records["key"][sample])
        end = int(self.records["key"][sample + 1]) if sample + 1 < self.samples else len(self._names)
        return self._names[start:end].tobytes().decode(errors="backslashreplace")

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension to (offset in the shard, size) of one sample's members."""
        return {name: (offset, size) for name, (offset, size, _) in self.member_spans(sample).items()}

    def member_spans(self, sample: int) -> dict[str, tuple[int, int, int]]:
        """Extension to (offset in the shard, size, XXH3-64) of one sample's members."""
        record: tuple[int, ...] = self.records[sample].item()
        base, first, layout = record[_OFFSET], record[_FIRST], self.layouts[record[_LAYOUT]]
        rows: list[tuple[int, int, int]] = self._members[first : first + len(layout)].tolist()
        return {
            name: (base + offset, size, checksum) for name, (checksum, offset, size) in zip(layout, rows, strict=True)
        }

    def verify(self) -> None:
        """Check every segment against its hash.

        Raises:
            DataError: one is not what was written.
        """
        self._check(tuple(self._segments))

    def expect(self, digest: str) -> None:
        """Compare with the digest in `dataset.json`.

        Raises:
            DataError: it is that of another catalogue.
        """
        if digest != self._digest:
            raise _unusable(self.location, f"{DATASET_NAME} belongs to another catalogue than the one beside it")

    def _read_header(self) -> dict[str, Any]:
        if len(self._bytes) < PREAMBLE.size:
            raise _unusable(self.location, "the catalogue is cut short")
        magic, version, length, digest = PREAMBLE.unpack(self._bytes[: PREAMBLE.size].tobytes())
        if magic != MAGIC or version != VERSION:
            raise _unusable(self.location, f"the catalogue is not of format version {VERSION}")
        text = self._bytes[PREAMBLE.size : PREAMBLE.size + length].tobytes()
        self._digest: str = digest.decode(errors="replace")
        if xxh3_64_hexdigest(text) != self._digest:
            raise _unusable(self.location, "the catalogue's header is damaged")
        try:
            header: dict[str, Any] = _checked_header(parse_json(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(self.location, f"the catalogue's header is none: {error!r:.200}") from error
        if any(part["offset"] + part["bytes"] > len(self._bytes) for part in header["segments"].values()):
            raise _unusable(self.location, "the catalogue is cut short")
        return header

    def _check_places(self) -> None:
        """Refuse records and shards that point out of the catalogue: it may come from anywhere.

        In a large one, whose records stay on the disk until they are asked for, a wrong record is an error when it is.
        """
        starts = self._shards["first"]
        if len(starts) and (starts.max() > self.samples or (starts[1:] < starts[:-1]).any()):
            raise _unusable(self.location, "the catalogue's shards are not of its samples")
        wrong = len(self.records) != self.samples or (self.tasks is not None and len(self.tasks) != self.samples)
        if wrong or (0 < self.samples <= _CHECKED_AT_ONCE and self._points_out()):
            raise _unusable(self.location, "the catalogue's records are not of its samples")

    def _points_out(self) -> bool:
        """Whether any record names what the catalogue has not."""
        records = self.records
        wide = np.array([len(layout) for layout in self.layouts] or [0], dtype=np.int64)
        return bool(
            records["layout"].max() >= len(self.layouts)
            or records["source"].max() >= len(self.sources)
            or records["shard"].max() >= len(self._shards)
            or records["offset"].max() > _LAST_OFFSET
            or (records["first"].astype(np.int64) + wide[records["layout"]]).max() > len(self._members)
            or records["key"].max() > len(self._names)
            or not all(np.isfinite(records[name]).all() for name in ("question_s", "answer_s"))
        )

    def _segment(self, name: str) -> NDArray[np.uint8]:
        part = self._segments[name]
        return self._bytes[part["offset"] : part["offset"] + part["bytes"]]

    def _table(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._segment(name).view(dtype)

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if xxh3_64_hexdigest(self._segment(name).data) != self._segments[name]["xxh3"]:
                raise _unusable(self.location, f"the catalogue is damaged in its segment {name}")

    def _check_shards(self, folder: Path) -> None:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}
        for name, size in zip(self.shard_names, self.shard_bytes.tolist(), strict=True):
            path = folder / name
            there = found.get(name)
            if there is None and (not path.is_file()):
                raise DataError(
                    f"shard {name} of the catalogue is missing",
                    where=str(path),
                    fix=f"copy it there again, or run `echox shards index {folder}` to go on without it",
                )
            there = path.stat().st_size if there is None else there
            if there != size:
                raise DataError(
                    f"shard {name} has {there:,} bytes where the catalogue records {size:,}: it was cut or replaced",
                    where=str(path),
                    fix=f"copy it again, or run `echox shards index {folder}` if it was meant to change",
                )


def _checked_header(header: Any) -> dict[str, Any]:
    """The header of a catalogue; ValueError, KeyError, TypeError or AttributeError where its fields are others."""
    rows = {"records": RECORD.itemsize, "members": MEMBER.itemsize, "shards": SHARD.itemsize, "speakers": 4}
    segments = header["segments"]
    for name in ("shards", "shard_names", "records", "members", "keys"):
        if name not in segments:
            raise ValueError(f"no segment {name}")
    for name, part in segments.items():
        if min(part["offset"], part["bytes"]) < 0 or not isinstance(part["xxh3"], str):
            raise ValueError(f"segment {name} lies nowhere")
        if part["bytes"] % rows.get(name, 1):
            raise ValueError(f"segment {name} has {part['bytes']} bytes")
    texts = [header["fingerprint"], *header["sources"], *header["optional"]]
    texts += [extension for layout in header["layouts"] for extension in layout]
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(header[name], list) for name in ("sources", "optional", "layouts")
    ):
        raise TypeError("fields of another type")
    if not isinstance(header["samples"], int) or header["samples"] < 0:
        raise ValueError(f"{header['samples']!r:.40} samples")
    return dict(header)


def read_listing(content: bytes, where: str) -> dict[str, Any]:
    """Decode `dataset.json`.

    Raises:
        DataError: it is not one, one from before datasets had a catalogue, or one that sends its readers where a
            dataset may not: to a command, to a folder of this machine, or to a protocol that chains others.
    """
    try:
        listing = parse_json(content)
        if not isinstance(listing["catalogue"], str) or not isinstance(listing["shards"], list):
            raise ValueError("fields of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(str(Path(where).parent), f"{DATASET_NAME} does not name a catalogue") from error
    shards_at = listing.get("shards_at", "")
    if shards_at and not (isinstance(shards_at, str) and ELSEWHERE.fullmatch(shards_at)):
        raise DataError(
            f"its shards_at is {str(shards_at)[:80]!r}: a dataset may name its shards by a URL of a web server or an "
            "object store and by nothing else",
            where=where,
            fix="index the shards where they are, and only use datasets whose source you trust",
        )
    return dict(listing)


def write_segments(path: Path, header: dict[str, Any], segments: dict[str, Path]) -> str:
    """Put a catalogue together from files of its segments; it appears under its name complete or not at all.

    Returns:
        Its digest.
    """
    layout: dict[str, dict[str, Any]] = {}
    # The header's length depends on the offsets it names, so they count from a first aligned place after it.
    for name, file in segments.items():
        layout[name] = {"offset": 0, "bytes": file.stat().st_size, "xxh3": _file_hash(file)}
    room = len(json.dumps({**header, "segments": layout})) + 24 * len(layout)
    at = _aligned(PREAMBLE.size + room)
    for part in layout.values():
        part["offset"] = at
        at = _aligned(at + part["bytes"])
    text = json.dumps({**header, "segments": layout}, sort_keys=True).encode()
    digest = xxh3_64_hexdigest(text)
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as out:
            out.write(PREAMBLE.pack(MAGIC, VERSION, len(text), digest.encode()) + text)
            for name, file in segments.items():
                out.seek(layout[name]["offset"])
                with file.open("rb") as source:
                    while block := source.read(1 << 22):
                        out.write(block)
            out.truncate(max(at, out.tell()))
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return digest


def _file_hash(path: Path) -> str:
    hasher = xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _aligned(place: int) -> int:
    return -(-place // ALIGN) * ALIGN


def _split(text: NDArray[np.uint8], starts: NDArray[Any]) -> list[str]:
    blob = text.tobytes()
    ends = [*starts[1:].tolist(), len(blob)]
    return [blob[start:end].decode() for start, end in zip(starts.tolist(), ends, strict=True)]


def _unusable(location: str, reason: str) -> DataError:
    return DataError(reason, where=location, fix=f"run `echox shards index {location}`")
