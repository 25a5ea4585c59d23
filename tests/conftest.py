"""What holds for all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

CLUSTER, RANKS = {"launch", "hostile"}, {"engine", "bench", "tracking"}
"""Folders whose tests start a Ray cluster, and those that start ranks, databases and servers: one at a time of each."""


def pytest_configure() -> None:
    """Hear Ctrl-C even where the shell that started the tests in the background has told them to ignore it.

    Programs that tests start and interrupt inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests share a process where several run, and skip what is marked `gpu` where torch sees none."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))
    _skip_gpu(items)


def _group(path: Path) -> str:
    folder = path.relative_to(Path(__file__).parent).parts[0]
    return "cluster" if folder in CLUSTER else "ranks" if folder in RANKS else str(path)


def _skip_gpu(items: list[pytest.Item]) -> None:
    """Torch is imported only where something is marked so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
