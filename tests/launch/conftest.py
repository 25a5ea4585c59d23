"""Lets the tests on Ray share their helpers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What another cluster is given by `launch.client.own_job`: its address, then the words of the job."""
    found: list[Any] = []

    class FakeJobs:
        def __init__(self, address: str) -> None:
            found.append(address)

        def submit_module(self, words: list[str], job: str, *_: Any) -> str:
            found.append(words)
            return job

    monkeypatch.setattr("launch.client.own_job.Jobs", FakeJobs)
    return found
