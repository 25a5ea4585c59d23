"""Caches fetched shards in a bounded folder that all processes of a node share.

A file is complete from the moment it is published. Whoever uses one holds a shared lock on it, whoever fetches one an
exclusive lock on its `.part`; the kernel drops both with the process, however it ends. Eviction takes the files used
longest ago, never one that is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from echox.config.paths import cache_dir
from echox.errors import DataError
from echox.files import exclusive
from echox.stream.storage.local import OpenShard

_LARGEST = 200 * 10**9
_SHARE_OF_DISK = 0.8
_SOUND, _DAMAGED, _PART = ".tar", ".damaged", ".part"

Fetch = Callable[[int], bool]
"""Writes a shard into the open file it is given; False where what came is not what was recorded."""


class CacheFullError(DataError):
    """The shards in use leave no room for one more."""


class NodeCache:
    """Fetched shards of this node.

    Args:
        folder: where they lie, best on a disk of the node.
        limit: most bytes of them; room for two windows of every source is needed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def default(cls) -> NodeCache:
        """In $ECHOX_STAGE_DIR (default: `staged` in the cache), of $ECHOX_STAGE_GB (default: 200, or 80 % of the disk).

        Raises:
            DataError: $ECHOX_STAGE_GB is no number above 0.
        """
        folder = Path(os.environ.get("ECHOX_STAGE_DIR") or cache_dir() / "staged").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("ECHOX_STAGE_GB")
        if not given:
            return cls(folder, min(_LARGEST, int(_SHARE_OF_DISK * shutil.disk_usage(folder).total)))
        try:
            limit = int(float(given) * 10**9)
        except ValueError:
            limit = 0
        if limit <= 0:
            raise DataError(
                f"ECHOX_STAGE_GB is {given!r}, not a number above 0", fix="give the size in GB, or unset it"
            )
        return cls(folder, limit)

    def take(self, name: str, size: int, fetch: Fetch) -> OpenShard:
        """A shard's file, locked against eviction for as long as it is held; fetched by one process if it is not here.

        Args:
            name: unique to the shard's place and content.
            size: its bytes.
            fetch: brings it.

        Raises:
            CacheFullError: no room, as all other shards are in use.
            DataError: the disk is full.
        """
        while True:
            held = self._hold(name, size)
            if held is not None:
                return held
            part = self._lock_part(name)
            if part is None:
                continue
            # Between looking for it and locking a new part, its fetcher may have published it.
            held = self._hold(name, size)
            if held is None:
                return self._fill(name, size, part, fetch)
            (self.folder / f"{name}{_PART}").unlink()
            return held

    def _hold(self, name: str, size: int) -> OpenShard | None:
        path = self.folder / f"{name}{_SOUND}"
        try:
            held = OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        fcntl.flock(held.descriptor, fcntl.LOCK_SH)
        # Between opening and locking it may have been evicted.
        if not _is_at(held.descriptor, path):
            return None
        if os.fstat(held.descriptor).st_size != size:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return held

    def _lock_part(self, name: str) -> OpenShard | None:
        """The file to fetch into, ours alone; None where another process has finished it while we waited."""
        path = self.folder / f"{name}{_PART}"
        part = OpenShard(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        while not _locked_now(part.descriptor):
            # Waiting for an exclusive lock would last until its fetcher lets go of what it published: training on two
            # ranks of a node would stand still, one waiting for the shard, the other for the first in a collective.
            fcntl.flock(part.descriptor, fcntl.LOCK_SH)
            if not _is_at(part.descriptor, path):
                return None
        return part if _is_at(part.descriptor, path) else None

    def _fill(self, name: str, size: int, part: OpenShard, fetch: Fetch) -> OpenShard:
        path = self.folder / f"{name}{_PART}"
        try:
            self._reserve(part.descriptor, path, size)
            sound = fetch(part.descriptor)
            os.fsync(part.descriptor)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = "free some space, or point ECHOX_STAGE_DIR elsewhere"
                raise DataError("the disk of the shard cache is full", where=str(self.folder), fix=fix) from error
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        # A damaged copy serves its holder only; others fetch their own and so notice when its source is repaired.
        os.replace(path, self.folder / f"{name}{_SOUND if sound else _DAMAGED}")
        fcntl.flock(part.descriptor, fcntl.LOCK_SH)
        return part

    def _reserve(self, descriptor: int, path: Path, size: int) -> None:
        """Make room and claim it by giving the file its final size, as one step among all processes."""
        with exclusive(self.folder / ".lock"):
            os.ftruncate(descriptor, 0)
            if size > self._room(path, size):
                raise CacheFullError(
                    f"the shard cache of {self.limit / 1e9:g} GB is full of shards in use",
                    where=str(self.folder),
                    fix="set ECHOX_STAGE_GB to more than two windows of shards of every source",
                )
            os.ftruncate(descriptor, size)

    def _room(self, claimed: Path, wanted: int) -> int:
        """Bytes free under the limit after evicting what is needed and may go."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (_SOUND, _DAMAGED, _PART) and path != claimed:
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                files.append((path.suffix == _SOUND, stat.st_mtime_ns, stat.st_size, path))
        room = self.limit - sum(size for *_, size, _ in files)
        # Abandoned parts and damaged copies first, then by last use.
        for _, _, size, path in sorted(files):
            if room >= wanted:
                break
            if _evict(path):
                room += size
        return room


def _evict(path: Path) -> bool:
    try:
        # On NFS an exclusive lock needs a descriptor that may write.
        file = OpenShard(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if not _locked_now(file.descriptor):
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _locked_now(descriptor: int) -> bool:
    """Whether nobody else has a lock; the exclusive one is then ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
