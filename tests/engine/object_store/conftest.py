"""An S3 server that may fail, for tests of runs in object stores."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import Faults, serve_s3

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture
def faults() -> Faults:
    """What the server does wrong; nothing until a test says so."""
    return Faults()


@pytest.fixture
def bucket(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:8]}"  # the server's contents outlive it within a process
    with serve_s3(name, faults) as variables:
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
