"""Indexes a folder of shards as a dataset: `x.tar.idx` beside each, one catalogue, and `dataset.json` that names it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from xxhash import xxh3_64_intdigest

from echox.errors import DataError, EchoXError
from echox.files import read_json, read_text, write_atomically
from echox.stream.format.catalogue import CATALOGUE_NAME, DATASET_NAME, SHARD, Catalogue, write_segments
from echox.stream.format.scan import RECORD, ShardTable, check_optional, member_rule, scan_shard, write_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int, int, int], None]
"""Called with shards done, shards in all, samples so far."""
_SEGMENTS = ("shards", "shard_names", "records", "tasks", "members", "keys")
_OF_SPEAKERS = ("speakers", "speaker_names")
"""Segments of a catalogue of which any sample says who speaks its answer."""


class CatalogueBuilder:
    """Collects the rows of shards, in order, in files beside the catalogue, and puts the catalogue together.

    Args:
        folder: where the catalogue and `dataset.json` go.
        optional: extensions that a sample may lack.
    """

    def __init__(self, folder: Path, optional: Collection[str] = ()) -> None:
        check_optional(optional)
        self._folder = folder
        self._optional = frozenset(optional)
        self._required: frozenset[str] | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix=".catalogue-", dir=folder))
        self._files: dict[str, IO[bytes]] = {
            name: (self._scratch / name).open("w+b") for name in (*_SEGMENTS, *_OF_SPEAKERS)
        }
        self._shards: list[dict[str, Any]] = []
        self._sources: dict[str, int] = {}
        self._layouts: dict[tuple[str, ...], int] = {}
        self._speakers: dict[str, int] = {}
        self._hashes: list[NDArray[np.uint64]] = []
        self._members = 0
        self._seconds = 0.0
        self.samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, name: str, table: ShardTable) -> None:
        """Append one shard.

        Raises:
            DataError: its samples have other members than those of the shards before.
        """
        for layout, extensions in enumerate(table.layouts):
            self._required, broken = member_rule(extensions, self._required, self._optional)
            if broken:
                key = table.keys[int((table.records["layout"] == layout).argmax())]
                raise DataError(
                    f"{name}: sample {key} {broken}",
                    where=str(self._folder / name),
                    fix="repair the sample, or declare the member optional",
                )
        records = table.records.copy()
        records["shard"] = len(self._shards)
        records["source"] = _renumber(table.sources, self._sources)[records["source"]]
        records["layout"] = _renumber(table.layouts, self._layouts)[records["layout"]]
        records["first"] += np.uint64(self._members)
        records["key"] += np.uint64(self._files["keys"].tell())
        named = _renumber(table.speaker_names, self._speakers) + 1
        speakers = np.append(0, named)[table.speakers].astype("<u4")
        row = np.zeros(1, dtype=SHARD)
        row["bytes"], row["first"], row["name"] = table.bytes, self.samples, self._files["shard_names"].tell()
        row["sha256"] = np.void(bytes.fromhex(table.sha256))
        for segment, content in (
            ("shards", row.tobytes()),
            ("shard_names", name.encode()),
            ("records", records.tobytes()),
            ("members", table.members.tobytes()),
            ("keys", "".join(table.keys).encode()),
            ("tasks", table.tasks.tobytes()),
            ("speakers", speakers.tobytes()),
        ):
            self._files[segment].write(content)
        self._hashes.append(np.array([xxh3_64_intdigest(key.encode()) for key in table.keys], dtype=np.uint64))
        self._shards.append({"name": name, "sha256": table.sha256, "samples": len(table.keys), "bytes": table.bytes})
        self._seconds += float(records["question_s"].sum(dtype=np.float64) + records["answer_s"].sum(dtype=np.float64))
        self._members += len(table.members)
        self.samples += len(table.keys)

    def finish(self, shards_at: str = "") -> dict[str, Any]:
        """Write the catalogue, then `dataset.json`.

        Args:
            shards_at: URL of the shards where they are not beside the catalogue.

        Returns:
            The content of `dataset.json`.

        Raises:
            DataError: two samples of one name.
        """
        self._files["speaker_names"].write(json.dumps(list(self._speakers)).encode())
        for file in self._files.values():
            file.flush()
        self._refuse_repeated_keys()
        fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()
        header = {
            "fingerprint": fingerprint,
            "samples": self.samples,
            "optional": sorted(self._optional),
            "sources": list(self._sources),
            "layouts": [list(layout) for layout in self._layouts],
        }
        names = (*_SEGMENTS, *_OF_SPEAKERS) if self._speakers else _SEGMENTS
        segments = {name: self._scratch / name for name in names}
        digest = write_segments(self._folder / CATALOGUE_NAME, header, segments)
        listing = {
            "version": 2,
            "samples": self.samples,
            "hours": round(self._seconds / 3600, 6),
            "fingerprint": fingerprint,
            "optional": sorted(self._optional),
            "catalogue": digest,
            **({"shards_at": shards_at} if shards_at else {}),
            "shards": self._shards,
        }
        _publish(self._folder / DATASET_NAME, json.dumps(listing, indent=1) + "\n")
        return listing

    def _refuse_repeated_keys(self) -> None:
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *self._hashes])
        order = np.argsort(hashes, kind="stable")
        twins = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(twins):
            return
        records = np.memmap(self._scratch / "records", dtype=np.uint8, mode="r")
        keys = (self._scratch / "keys").read_bytes()
        starts = np.append(_column(records, "key"), np.uint64(len(keys))).tolist()
        shards = _column(records, "shard")
        for place in twins.tolist():
            first, second = sorted(order[place : place + 2].tolist())
            name = keys[starts[first] : starts[first + 1]]
            if name == keys[starts[second] : starts[second + 1]]:
                one, other = (self._shards[int(shards[sample])]["name"] for sample in (first, second))
                raise DataError(
                    f"{other}, byte {int(_column(records, 'offset')[second])}: sample {name.decode()} is in {one} too",
                    where=str(self._folder / other),
                    fix="give every sample of the dataset a name of its own",
                )


def index_folder(
    folder: str | Path,
    *,
    optional: Collection[str] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check every shard of a folder and make it a dataset; an index already there is replaced.

    Args:
        folder: shards `*.tar`, in the order of their names, made by any tool that writes WebDataset's format.
        optional: extensions that a sample may lack; None takes those declared before, if any.
        workers: processes; 1 works in this one.
        progress: called after every shard.

    Returns:
        The content of `dataset.json`: {"version", "samples", "hours", "fingerprint", "optional", "catalogue",
        "shards"}; the fingerprint is SHA-256 over the shards' SHA-256 in order, the catalogue that file's hash.

    Raises:
        DataError: no shards, or what `scan_shard` and `CatalogueBuilder` refuse; the old index is then still there.
        EchoXError: the folder cannot be written to, or a shard not be read.
    """
    folder = Path(folder)
    shards = find_shards(folder)
    declared = earlier_optional(folder) if optional is None else tuple(optional)
    try:
        with CatalogueBuilder(folder, declared) as builder:
            for done, (shard, table) in enumerate(scan_shards(shards, declared, workers), 1):
                write_index(shard, table)
                builder.add(shard.name, table)
                if progress:
                    progress(done, len(shards), builder.samples)
            return builder.finish()
    except OSError as error:
        raise EchoXError(
            f"The index cannot be written: {error.strerror or error}",
            where=str(folder),
            fix="make room, or get the right to write there, and run the same command again",
        ) from error


def find_shards(folder: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        DataError: none there, or compressed ones.
    """
    packed = sorted(path for pattern in ("*.tar.*", "*.tgz") for path in folder.glob(pattern) if path.suffix != ".idx")
    if packed:
        raise DataError(
            f"{packed[0].name} is a compressed tar, which has no offsets", where=str(folder), fix="decompress it"
        )
    shards = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not shards:
        raise DataError("There are no shards *.tar", where=str(folder), fix="name a folder of WebDataset shards")
    return shards


def earlier_optional(folder: Path) -> tuple[str, ...]:
    """Members declared optional when the folder was indexed before; none if it was not."""
    try:
        return tuple(map(str, read_json(folder / DATASET_NAME)["optional"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def scan_shards(shards: Sequence[Path], optional: Collection[str], workers: int) -> Iterator[tuple[Path, ShardTable]]:
    """Tables of shards in their order, worked out side by side."""
    scan = partial(scan_shard, optional=tuple(optional))
    if min(workers, len(shards)) < 2:
        yield from ((shard, scan(shard)) for shard in shards)
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from zip(shards, pool.map(scan, shards), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def is_indexed(folder: Path) -> bool:
    """Whether the folder's catalogue can be opened and is that of its shards."""
    try:
        Catalogue.open(folder)
    except DataError:
        return False
    return True


def _publish(path: Path, text: str) -> None:
    """Replace a file at once; one of equal content keeps its date, by which others tell whether data is new."""
    with contextlib.suppress(OSError, ValueError):
        if read_text(path) == text:
            return
    write_atomically(path, text)


def _renumber(names: Iterable[Any], known: dict[Any, int]) -> NDArray[np.int64]:
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


def _column(records: NDArray[np.uint8], name: str) -> NDArray[Any]:
    return records.view(RECORD)[name]
