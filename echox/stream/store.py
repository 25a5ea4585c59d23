"""Verified bytes of any sample of a catalogue, from local shards or from staged remote ones."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from echox.errors import CorruptSampleError, DataError, TransientReadError
from echox.stream.catalogue import Catalogue
from echox.stream.scan import JSON, decode_meta

_OPEN_FILES = 128
# What a network file system or a tired disk may answer once and not the next time.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN",
                 "EHOSTUNREACH", "ECONNRESET", "ECONNABORTED", "EREMOTEIO", "ENOLINK")
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One sample in memory, as it was when it was indexed.

    Attributes:
        key: its name.
        number: its number in the catalogue.
        members: extension to bytes, of the members asked for.
        meta: the decoded `json` member.
    """

    key: str
    number: int
    members: Mapping[str, bytes]
    meta: dict[str, Any]

    def __getitem__(self, extension: str) -> bytes:
        """Bytes of one member.

        Raises:
            CorruptSampleError: the sample has none of this name.
        """
        if extension not in self.members:
            raise CorruptSampleError(
                f"sample {self.key} has no member {extension}", kind="member", fix="build the dataset with it"
            )
        return self.members[extension]


@dataclass(frozen=True)
class Retry:
    """How often and how patiently an operation that may pass is tried again.

    Attributes:
        attempts: in all.
        first_wait_s: before the second attempt; doubled before each later one, to `longest_wait_s` at most.
    """

    attempts: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0

    def wait(self, attempt: int) -> None:
        """Sleep after failed attempt number `attempt`, counted from 0."""
        time.sleep(min(self.longest_wait_s, self.first_wait_s * 2**attempt))


class _Shard:
    """An open file that closes itself when nobody holds it, so that one thread cannot close what another reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardStore:
    """Reads samples by number; any thread may call any method.

    Args:
        catalogue: what lies where.
        retry: for reads that fail in a way that may pass.
    """

    def __init__(self, catalogue: Catalogue, *, retry: Retry | None = None) -> None:
        self.catalogue = catalogue
        self._retry = retry or Retry()
        self._folder = Path(catalogue.location)
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample: int, members: Collection[str] | None = None) -> Sample:
        """One sample, every byte checked.

        Args:
            sample: its number in the catalogue.
            members: extensions wanted; None means all. Those the sample lacks are left out.

        Raises:
            CorruptSampleError: its bytes are not those that were indexed (`kind` "checksum"), or end early (`kind`
                "truncated").
            TransientReadError: reading failed again and again.
            DataError: the shard is gone.
        """
        places = self.catalogue.places(sample)
        shard = int(self.catalogue.records["shard"][sample])
        wanted = places if members is None else {name: at for name, at in places.items() if name in members}
        read = {name: self._verified(sample, shard, name, *at) for name, at in wanted.items()}
        text = read[JSON] if JSON in read else self._verified(sample, shard, JSON, *places[JSON])
        return Sample(self.catalogue.key(sample), sample, read, decode_meta(text))

    def stage(self, shards: Sequence[int]) -> None:
        """Announce the shards of the next window, so that remote ones are fetched ahead of their use."""

    def close(self) -> None:
        """Close the shards; reads in other threads finish first."""
        with self._lock:
            self._open.clear()

    def _verified(self, sample: int, shard: int, member: str, offset: int, size: int, checksum: int) -> bytes:
        data = self._pread(shard, offset, size)
        if len(data) != size:
            raise self._corrupt(sample, shard, member, offset, "truncated", "is cut short")
        if xxh3_64_intdigest(data) != checksum:
            raise self._corrupt(sample, shard, member, offset, "checksum", "has changed since it was indexed")
        return data

    def _corrupt(
        self, sample: int, shard: int, member: str, offset: int, kind: str, happened: str
    ) -> CorruptSampleError:
        name = self.catalogue.shard_names[shard]
        return CorruptSampleError(
            f"{name}, byte {offset}: member {member} of sample {self.catalogue.key(sample)} {happened}",
            kind=kind,
            where=str(self._folder / name),
            fix="copy the shard again",
        )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        for attempt in range(self._retry.attempts):
            try:
                data = os.pread(self._shard(shard).descriptor, size, offset)
                # One call reads at most 2 GiB, and a network file system may give less than it was asked for.
                while 0 < len(data) < size:
                    more = os.pread(self._shard(shard).descriptor, size - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
                return data
            except OSError as error:
                self._forget(shard)
                last = error
                if error.errno not in _TRANSIENT:
                    break
                if attempt + 1 < self._retry.attempts:
                    self._retry.wait(attempt)
        path = str(self._folder / self.catalogue.shard_names[shard])
        if last.errno in _TRANSIENT:
            raise TransientReadError(
                f"reading failed {self._retry.attempts} times: {last.strerror}",
                where=path,
                fix="mend the storage, resume",
            ) from last
        raise DataError(f"the shard cannot be read: {last.strerror}", where=path, fix="mend the folder") from last

    def _shard(self, shard: int) -> _Shard:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = _Shard(self._path(shard))
        with self._lock:
            opened = self._open.setdefault(shard, opened)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return opened

    def _forget(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)

    def _path(self, shard: int) -> Path:
        return self._folder / self.catalogue.shard_names[shard]


def read_folder(location: str | Path, members: Collection[str] | None = None) -> Iterator[Sample]:
    """Every sample of a dataset in order, checked; see `ShardStore.read`.

    Raises:
        DataError: see `Catalogue.open` and `ShardStore.read`.
    """
    catalogue = Catalogue.open(location)
    store = ShardStore(catalogue)
    try:
        for sample in range(catalogue.samples):
            yield store.read(sample, members)
    finally:
        store.close()
