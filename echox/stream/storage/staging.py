"""Fetches remote shards whole into the node's cache one window ahead, and opens them there."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from echox.errors import DataError
from echox.files import exclusive
from echox.stream.format.catalogue import CATALOGUE_NAME, DATASET_NAME, Catalogue, read_listing
from echox.stream.storage.cache import CacheFullError, NodeCache
from echox.stream.storage.local import OpenShard
from echox.stream.storage.remote import Remote
from echox.stream.storage.retry import PassingError, Retry

PART = 8 << 20
"""Bytes of one ranged request: large enough for an object store's full speed."""
_PARTS_AT_ONCE = 8
_SHARDS_AT_ONCE = 2
_KEPT_UNSTAGED = 16


class StagedShards:
    """The shards of a remote dataset.

    The shards of the last two windows announced are held; so are a few of those read without announcement.

    Args:
        catalogue: sizes and hashes.
        remote: where the shards are.
        cache: where they go.
        retry: for each request.
    """

    def __init__(self, catalogue: Catalogue, remote: Remote, cache: NodeCache, retry: Retry) -> None:
        self._catalogue = catalogue
        self._remote = remote
        self._cache = cache
        self._retry = retry
        self._sizes = catalogue.shard_bytes
        self._windows: deque[frozenset[int]] = deque(maxlen=2)
        self._shards: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._fetchers = ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="stage")
        self._requests = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="stage-part")

    def where(self, shard: int) -> str:
        """URL of a shard."""
        return self._remote.where(self._catalogue.shard_names[shard])

    def stage(self, shards: Sequence[int]) -> None:
        """Start to fetch the next window; let go of the one before the current."""
        with self._lock:
            self._windows.append(frozenset(shards))
            self._let_go(0)
            for shard in shards:
                if shard not in self._shards:
                    self._shards[shard] = self._fetchers.submit(self._take, shard)

    def open(self, shard: int) -> OpenShard:
        """The file of a shard, fetched now if it was not announced.

        Raises:
            TransientReadError: it could not be fetched.
            DataError: it is not there, not what was indexed, or the cache is full.
        """
        with self._lock:
            future = self._shards.get(shard)
        if future is not None:
            # The window ahead may have found no room while the one before was in use; there may be some by now.
            with suppress(CacheFullError, CancelledError):
                return self._result(shard, future)
        mine: Future[OpenShard] = Future()
        with self._lock:
            future = self._shards.setdefault(shard, mine)
            self._shards.move_to_end(shard)
            self._let_go(_KEPT_UNSTAGED)
        if future is mine:
            try:
                mine.set_result(self._take(shard))
            except BaseException as error:
                mine.set_exception(error)
        return self._result(shard, future)

    def forget(self, shard: int) -> None:
        """Open a shard again when it is next used."""
        with self._lock:
            self._shards.pop(shard, None)

    def close(self) -> None:
        """Stop fetching and let go of all shards; reads in other threads finish first."""
        self._closed = True
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._requests.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._shards.clear()

    def _result(self, shard: int, future: Future[OpenShard]) -> OpenShard:
        """The outcome of a fetch; one that failed is forgotten, so that the next reader tries again."""
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._shards.get(shard) is future:
                    del self._shards[shard]
            raise

    def _let_go(self, kept: int) -> None:
        """Drop the shards outside the announced windows, but for the last `kept` used."""
        announced = frozenset().union(*self._windows)
        others = [shard for shard in self._shards if shard not in announced]
        for shard in others[: max(0, len(others) - kept)]:
            self._shards.pop(shard).cancel()

    def _take(self, shard: int) -> OpenShard:
        digest = self._catalogue.shard_sha256(shard)
        size = int(self._sizes[shard])
        name = f"{xxh3_64_hexdigest(self._remote.location.encode())}-{digest[:32]}"
        return self._cache.take(name, size, lambda file: self._fetch(shard, file, size, digest))

    def _fetch(self, shard: int, file: int, size: int, digest: str) -> bool:
        """Bring one shard into a file; False where its source holds other bytes than were indexed.

        Bytes that change on the way differ from one fetch to the next; the same wrong hash twice is the source's own,
        and then the samples' checksums say which of them are damaged.
        """
        found: set[str] = set()

        def once() -> str:
            if self._remote.ranged:
                self._fetch_parts(shard, file, size)
            else:
                self._fetch_stream(shard, file, size)
            came = _sha256(file, size)
            if came != digest and came not in found:
                found.add(came)
                raise PassingError(f"its SHA-256 is {came[:12]}… where the catalogue records {digest[:12]}…")
            return came

        sound = self._retry(once, "fetching the shard", self.where(shard)) == digest
        if not sound:
            print(f"{self.where(shard)} is not what was indexed; its samples are checked one by one", file=sys.stderr)
        return sound

    def _fetch_parts(self, shard: int, file: int, size: int) -> None:
        name = self._catalogue.shard_names[shard]

        def part(start: int) -> None:
            stop = min(start + PART, size)
            what = f"fetching bytes {start}-{stop - 1}"
            data = self._retry(lambda: self._part(name, start, stop, size), what, self.where(shard))
            os.pwrite(file, data, start)

        futures = [self._requests.submit(part, start) for start in range(0, size, PART)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def _part(self, name: str, start: int, stop: int, size: int) -> bytes:
        if self._closed:
            raise DataError("the store was closed while it fetched", where=self._remote.where(name))
        return self._remote.part(name, start, stop, size)

    def _fetch_stream(self, shard: int, file: int, size: int) -> None:
        at = 0
        for block in self._remote.stream(self._catalogue.shard_names[shard]):
            if at + len(block) > size:
                raise PassingError(f"more than the {size} bytes recorded came")
            os.pwrite(file, block, at)
            at += len(block)
        if at != size:
            raise PassingError(f"{at} bytes came where the catalogue records {size}")


def fetch_catalogue(remote: Remote, cache: NodeCache, retry: Retry) -> tuple[Path, str]:
    """Bring a remote dataset's catalogue into the node's cache, once for all its processes.

    Returns:
        Its file, and its digest by the remote `dataset.json`.

    Raises:
        TransientReadError: it could not be fetched.
        DataError: it is not there, or does not belong to the `dataset.json` beside it.
    """

    def listing() -> bytes:
        return b"".join(remote.stream(DATASET_NAME))

    where = remote.where(DATASET_NAME)
    digest = read_listing(retry(listing, "fetching dataset.json", where), where)["catalogue"]
    folder = cache.folder / "catalogues"
    folder.mkdir(exist_ok=True)
    path = folder / f"{xxh3_64_hexdigest(digest.encode())}.catalogue"

    def download() -> None:
        scratch = path.with_suffix(".part")
        with scratch.open("wb") as file:
            for block in remote.stream(CATALOGUE_NAME):
                file.write(block)
        try:
            came = Catalogue(scratch, remote.location)
            came.verify()
        except DataError as error:
            raise PassingError(error.what) from error
        if came.digest != digest:
            raise PassingError("dataset.catalogue and dataset.json do not belong together")
        os.replace(scratch, path)

    with exclusive(folder / ".lock"):
        with suppress(DataError):
            Catalogue(path, remote.location).verify()
            return path, digest
        retry(download, f"fetching {CATALOGUE_NAME}", remote.where(CATALOGUE_NAME))
    return path, digest


def _sha256(file: int, size: int) -> str:
    hasher = hashlib.sha256()
    for start in range(0, size, PART):
        hasher.update(os.pread(file, min(PART, size - start), start))
    return hasher.hexdigest()
