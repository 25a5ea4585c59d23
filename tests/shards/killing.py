"""Work that is killed at a chosen call, in a process of its own: a copy of a process with threads may hang."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from tests.shards.dying import die

Work = Callable[[], Any]

_PROCESSES = multiprocessing.get_context("forkserver")
# Imported once, by a process that never starts a thread and that the others are copies of.
_PROCESSES.set_forkserver_preload(["echox.units.extract", "shards.builder.answer_units", "tests.shards.layouts"])


def killed(work: Work, module: str, name: str, calls: int) -> None:
    """Do the work (something that pickles) in a new process that is killed at the given call of a function."""
    child = _PROCESSES.Process(target=_until, args=(work, module, name, calls))
    child.start()
    child.join(timeout=120)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"still alive after 120 s, before call {calls} of {module}.{name}")
    assert child.exitcode == -signal.SIGKILL


def _until(work: Work, module: str, name: str, calls: int) -> None:
    where = importlib.import_module(module)
    real, count = getattr(where, name), 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            die()
        return real(*args, **more)

    setattr(where, name, counted)
    work()
