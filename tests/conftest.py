"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Several processes of several threads each wait for one another's threads where there are fewer cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GROUPS = {
    "cluster": ("launch", "hostile"),
    "ranks": ("engine", "bench", "tracking"),
}
"""Folders whose tests start a Ray cluster, and those that start ranks, databases and servers: one at a time of each."""


def pytest_configure() -> None:
    """Hear Ctrl-C even where the shell that started the tests in the background has told them to ignore it.

    Programs that tests start and interrupt inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests share a process where several run, the longest first; skip what needs a GPU where there is none."""
    _group(items)
    _skip_gpu(items)


def _group(items: list[pytest.Item]) -> None:
    places = {folder: place for place, folders in enumerate(GROUPS.values()) for folder in folders}
    for item in items:
        place = places.get(_folder(item))
        item.add_marker(pytest.mark.xdist_group(str(item.path) if place is None else list(GROUPS)[place]))
    items.sort(key=lambda item: places.get(_folder(item), len(GROUPS)))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def _skip_gpu(items: list[pytest.Item]) -> None:
    """Torch is imported only where something is marked so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
