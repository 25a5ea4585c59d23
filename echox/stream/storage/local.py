"""Opens the shards of a local folder, and keeps the last ones used open."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

_OPEN_AT_ONCE = 128


class OpenShard:
    """A file that closes with its last reference, so that no thread closes what another one reads.

    A lock on the file goes with it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class LocalShards:
    """The shards of a folder, the last ones used kept open.

    Args:
        folder: where they are.
        names: their files, by number.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._open: dict[int, OpenShard] = {}
        self._lock = threading.Lock()

    def where(self, shard: int) -> str:
        """Path of a shard."""
        return str(self._folder / self._names[shard])

    def open(self, shard: int) -> OpenShard:
        """The file of a shard.

        Raises:
            OSError: it cannot be opened.
        """
        # Looked up without the lock, which is what makes a read cheap; the price is that the oldest file goes first.
        found = self._open.get(shard)
        if found is not None:
            return found
        opened = OpenShard(os.open(self.where(shard), os.O_RDONLY | os.O_CLOEXEC))
        with self._lock:
            opened = self._open.setdefault(shard, opened)
            while len(self._open) > _OPEN_AT_ONCE:
                del self._open[next(iter(self._open))]
        return opened

    def stage(self, shards: Sequence[int]) -> None:
        """Nothing to fetch: the shards are here."""

    def forget(self, shard: int) -> None:
        """Open a shard again when it is next used."""
        with self._lock:
            self._open.pop(shard, None)

    def close(self) -> None:
        """Let go of all files; reads in other threads finish first."""
        with self._lock:
            self._open.clear()
