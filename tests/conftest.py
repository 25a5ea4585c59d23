"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

# Several processes of several threads each wait for one another's threads where there are fewer cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GROUPS = {
    "cluster": ("tests/launch/", "tests/hostile/"),
    "ranks": ("tests/engine/", "tests/bench/", "tests/tracking/"),
}
"""Folders whose tests start a Ray cluster, and those that start ranks, databases and servers: one at a time of each."""


def pytest_configure() -> None:
    """Hear Ctrl-C even where the shell that started the tests in the background has told them to ignore it.

    Programs that tests start and interrupt inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run (`-n 2`), give a group of tests, or else a file, to one of them."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return next((name for name, folders in GROUPS.items() if file.startswith(folders)), file)

    return Grouped(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees none; torch is imported only where something is marked so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
