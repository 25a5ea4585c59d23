"""Runs worker processes, and keeps two builds out of one folder by a lock."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from echox.errors import EchoXError

_LOCK = "lock"


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold a folder against a second build; the lock goes with the process, however it ends.

    Raises:
        EchoXError: another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EchoXError("Another build is at work there", where=str(work), fix="Wait for it to end.") from error
        try:
            yield
        finally:
            if work.is_dir() and [path.name for path in work.iterdir()] == [_LOCK]:
                (work / _LOCK).unlink()
                work.rmdir()


def executor(workers: int) -> Executor:
    """A pool of so many processes; for one, this process itself."""
    if workers == 1:
        return _Here()
    # Spawned, not forked: the threads of this process would be missing in a copy of it.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)


def submit(pool: Executor, work: Callable[..., Any], *args: Any) -> Future[Any]:
    """Hand work to a pool with Ctrl-C held back for a moment.

    A worker that is started by it inherits the blocked signal: it leaves Ctrl-C to this process, from its first
    instruction on.
    """
    if isinstance(pool, _Here):
        return pool.submit(work, *args)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def abandon(pool: Executor, *, kill: bool) -> None:
    """Give up what a pool has not begun; `kill` also ends the workers in the middle of what they do.

    A build leaves nothing half done under a final name, so whoever interrupts it need not wait for them.
    """
    workers = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers if kill else ():
        worker.kill()


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is killed, instead of waiting for work indefinitely."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


class _Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the function."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
