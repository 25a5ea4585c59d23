from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.parts import Server, on_sqlite, watchers


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite store whose tables exist; creating them takes seconds."""
    folder = tmp_path_factory.mktemp("template")
    on_sqlite(folder).search_experiments()
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def storage(tmp_path: Path, template: bytes) -> Iterator[Path]:
    (tmp_path / "mlflow.db").write_bytes(template)
    yield tmp_path
    for folder in tmp_path.iterdir():
        for pid in watchers(folder):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def server(storage: Path) -> Iterator[Server]:
    made = Server(storage)
    yield made
    made.kill()
