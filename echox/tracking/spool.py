"""The journal of what a tracking server has not taken yet: JSON lines beside the run, replayed when it is back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Operation = dict[str, Any]
"""`kind` is metrics, params, tags or artifact; the rest is what `echox.tracking.client.send` reads. JSON types."""


class Spool:
    """One writer's file in the run's spool folder; appends are flushed, so a killed process loses nothing."""

    def __init__(self, folder: Path, writer: str) -> None:
        self.path = folder / f"{writer}.jsonl"
        self._lock = threading.Lock()

    def append(self, operation: Operation) -> None:
        """Keep one operation for later."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(operation) + "\n")


def pending(folder: Path) -> list[Path]:
    """Spool files that wait for delivery."""
    return sorted(folder.glob("*.jsonl")) if folder.is_dir() else []


def operations(path: Path) -> Iterator[Operation]:
    """The operations of one spool file; a last line cut short by a crash is skipped."""
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
