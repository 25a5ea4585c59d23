"""The node's cache: bounded, shared, and never without a file that somebody uses."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from echox.errors import DataError
from echox.stream.storage.cache import CacheFullError, NodeCache


def writing(content: bytes, calls: list[bytes] | None = None, sound: bool = True) -> Callable[[int], bool]:
    def fetch(file: int) -> bool:
        if calls is not None:
            calls.append(content)
        os.pwrite(file, content, 0)
        return sound

    return fetch


def names(cache: NodeCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def test_a_file_is_fetched_once_and_found_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    calls: list[bytes] = []
    for _ in range(2):
        held = cache.take("a", 100, writing(b"a" * 100, calls))
        assert os.pread(held.descriptor, 200, 0) == b"a" * 100
    assert len(calls) == 1 and names(cache) == ["a.tar"]


def test_a_file_published_between_the_look_and_the_lock_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = NodeCache(tmp_path, 1000), NodeCache(tmp_path, 1000)
    calls: list[bytes] = []
    lock_part = ours._lock_part

    def late(name: str) -> object:
        theirs.take(name, 100, writing(b"a" * 100, calls))
        return lock_part(name)

    monkeypatch.setattr(ours, "_lock_part", late)
    held = ours.take("a", 100, writing(b"b" * 100, calls))
    assert os.pread(held.descriptor, 1, 0) == b"a"
    assert calls == [b"a" * 100] and names(ours) == ["a.tar"]


def test_who_waits_for_a_fetch_has_the_file_while_its_fetcher_still_holds_it(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    calls: list[bytes] = []
    taken = []
    second = threading.Thread(target=lambda: taken.append(cache.take("a", 1, writing(b"b", calls))), daemon=True)

    def fetch(file: int) -> bool:
        second.start()
        number = os.fstat(file).st_ino
        deadline = time.monotonic() + 60
        while not any("->" in line and f":{number} " in line for line in Path("/proc/locks").read_text().splitlines()):
            assert time.monotonic() < deadline, "the second never came to wait"
            time.sleep(0.01)
        return writing(b"a", calls)(file)

    held = cache.take("a", 1, fetch)
    second.join(timeout=60)
    assert len(taken) == 1 and os.path.sameopenfile(taken[0].descriptor, held.descriptor)
    assert calls == [b"a"] and names(cache) == ["a.tar"]


@pytest.fixture(params=["local", "nfs"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS turns a lock into one of bytes: an exclusive one wants a descriptor that writes, a shared one that reads."""
    if request.param == "local":
        return
    lock, refused = fcntl.flock, {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}

    def of_nfs(descriptor: int, operation: int) -> None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if refused.get(operation & ~fcntl.LOCK_NB) == mode:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)


def test_the_file_used_longest_ago_makes_room(tmp_path: Path, file_system: None) -> None:
    cache = NodeCache(tmp_path, 300)
    for place, name in enumerate("abc"):
        cache.take(name, 100, writing(b"x" * 100))
        os.utime(tmp_path / f"{name}.tar", ns=(place, place))
    cache.take("a", 100, writing(b""))
    cache.take("d", 150, writing(b"x" * 150))
    assert names(cache) == ["a.tar", "d.tar"]


def test_what_is_in_use_stays_also_in_another_process(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 300)
    code = (
        "import sys; from pathlib import Path; from echox.stream.storage.cache import NodeCache\n"
        "held = NodeCache(Path(sys.argv[1]), 300).take('theirs', 100, lambda file: True)\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    mine = cache.take("mine", 100, writing(b"x" * 100))
    cache.take("free", 100, writing(b"x" * 100))
    cache.take("new", 100, writing(b"x" * 100))
    assert names(cache) == ["mine.tar", "new.tar", "theirs.tar"]
    with pytest.raises(CacheFullError, match="full of shards in use"):
        cache.take("large", 101, writing(b""))
    assert not (tmp_path / "large.part").exists()
    # The other's lock ends with it, however it ends.
    other.kill()
    other.communicate()
    cache.take("large", 200, writing(b"x" * 200))
    assert names(cache) == ["large.tar", "mine.tar"]
    assert mine.descriptor


def test_a_fetch_that_was_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "old.part").write_bytes(b"x" * 250)
    cache = NodeCache(tmp_path, 300)
    cache.take("a", 100, writing(b"x" * 100))
    assert names(cache) == ["a.tar"]
    (tmp_path / "b.part").write_bytes(b"y" * 500)
    assert os.pread(cache.take("b", 3, writing(b"abc")).descriptor, 9, 0) == b"abc"
    assert names(cache) == ["a.tar", "b.tar"]


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 300)

    def fails(file: int) -> bool:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.take("a", 100, fails)

    def disk_full(file: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="the disk of the shard cache is full"):
        cache.take("a", 100, disk_full)
    assert names(cache) == []


def test_a_file_of_another_length_and_a_damaged_one_are_fetched_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 300)
    (tmp_path / "a.tar").write_bytes(b"half")
    assert os.pread(cache.take("a", 8, writing(b"complete")).descriptor, 9, 0) == b"complete"
    calls: list[bytes] = []
    first = cache.take("b", 3, writing(b"bad", calls, sound=False))
    second = cache.take("b", 3, writing(b"not", calls))
    assert os.pread(first.descriptor, 3, 0) == b"bad" and os.pread(second.descriptor, 3, 0) == b"not"


def test_its_place_and_size_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_STAGE_DIR", str(tmp_path / "disk"))
    monkeypatch.setenv("ECHOX_STAGE_GB", "1.5")
    cache = NodeCache.default()
    assert (cache.folder, cache.limit) == (tmp_path / "disk", 1_500_000_000)
    monkeypatch.setenv("ECHOX_STAGE_GB", "much")
    with pytest.raises(DataError, match="ECHOX_STAGE_GB is 'much'"):
        NodeCache.default()
    monkeypatch.delenv("ECHOX_STAGE_GB")
    assert 0 < NodeCache.default().limit <= 200 * 10**9
