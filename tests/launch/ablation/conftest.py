"""A SQLite store whose tables exist: creating them takes seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.parts import on_sqlite, watchers


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """Folder of runs with a store in it; no process of it is left."""
    folder = tmp_path / "runs"
    folder.mkdir()
    on_sqlite(folder).search_experiments()
    yield folder
    for run in (folder / "ablation").glob("*"):
        for pid in watchers(run):
            os.kill(pid, signal.SIGKILL)
