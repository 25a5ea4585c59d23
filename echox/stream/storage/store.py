"""Reads verified samples of a dataset from local or staged remote shards."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from echox.errors import CorruptSampleError, DataError
from echox.stream.format.catalogue import Catalogue
from echox.stream.format.scan import JSON, decode_meta
from echox.stream.storage.cache import NodeCache
from echox.stream.storage.local import LocalShards
from echox.stream.storage.remote import is_remote, open_remote
from echox.stream.storage.retry import PassingError, Retry, may_pass
from echox.stream.storage.staging import StagedShards, fetch_catalogue


def open_catalogue(location: str | Path, *, cache: NodeCache | None = None, retry: Retry | None = None) -> Catalogue:
    """Open the catalogue of a folder of shards, or of a URL of one.

    Args:
        location: folder or URL; a folder may hold the catalogue of shards that are elsewhere.
        cache: where a remote catalogue goes; None takes `NodeCache.default`.
        retry: for its requests.

    Raises:
        TransientReadError: a remote one could not be fetched.
        DataError: no catalogue, a damaged one, one of other shards, or a shard missing or not of its size.
    """
    if not is_remote(location):
        return Catalogue.open(Path(location))
    path, digest = fetch_catalogue(open_remote(str(location)), cache or NodeCache.default(), retry or Retry())
    catalogue = Catalogue(path, str(location))
    catalogue.expect(digest)
    return catalogue


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


class ShardStore:
    """Reads samples by number; any thread may call any method.

    Args:
        catalogue: what lies where.
        cache: where remote shards go; None takes `NodeCache.default`. Local shards need none.
        retry: for reads and requests that fail in a way that may pass.
    """

    def __init__(self, catalogue: Catalogue, *, cache: NodeCache | None = None, retry: Retry | None = None) -> None:
        self.catalogue = catalogue
        self._retry = retry or Retry()
        self._shards: LocalShards | StagedShards
        if is_remote(catalogue.location):
            remote = open_remote(catalogue.location)
            self._shards = StagedShards(catalogue, remote, cache or NodeCache.default(), self._retry)
        else:
            self._shards = LocalShards(Path(catalogue.location), catalogue.shard_names)

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
        spans = self.catalogue.member_spans(sample)
        shard = int(self.catalogue.records["shard"][sample])
        wanted = spans if members is None else {name: at for name, at in spans.items() if name in members}
        read = {name: self._verified(sample, shard, name, *at) for name, at in wanted.items()}
        text = read[JSON] if JSON in read else self._verified(sample, shard, JSON, *spans[JSON])
        return Sample(self.catalogue.key(sample), sample, read, decode_meta(text))

    def stage(self, shards: Sequence[int]) -> None:
        """Announce the shards of the next window, so that remote ones are fetched ahead of their use.

        The shards of this window and of the one announced before stay in the node's cache meanwhile.
        """
        self._shards.stage(shards)

    def close(self) -> None:
        """Let go of the shards; reads in other threads finish first."""
        self._shards.close()

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
            where=self._shards.where(shard),
            fix="copy the shard again",
        )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._shards.open(shard).descriptor, size, offset)
        except OSError:
            data = b""
        if len(data) == size:
            return data
        return self._retry(lambda: self._pread_slowly(shard, offset, size), "reading", self._shards.where(shard))

    def _pread_slowly(self, shard: int, offset: int, size: int) -> bytes:
        """The same from a file opened again, in as many calls as it takes: one call reads 2 GiB at most."""
        self._shards.forget(shard)
        data = b""
        try:
            file = self._shards.open(shard)
            while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            if may_pass(error):
                raise PassingError(error.strerror or str(error)) from error
            raise DataError(
                f"the shard cannot be read: {error.strerror}", where=self._shards.where(shard), fix="repair the folder"
            ) from error
        return data


def read_folder(location: str | Path, members: Collection[str] | None = None) -> Iterator[Sample]:
    """Every sample of a dataset in order, checked; see `ShardStore.read`.

    Raises:
        DataError: see `open_catalogue` and `ShardStore.read`.
    """
    catalogue = open_catalogue(location)
    store = ShardStore(catalogue)
    try:
        for sample in range(catalogue.samples):
            yield store.read(sample, members)
    finally:
        store.close()
