"""Times named parts of a forward where the device computes them, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PartTimer:
    """Seconds in parts since they were last read: by events on a GPU, by the clock on a CPU."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Count what happens inside as part `name`."""
        if device.type != "cuda":
            before = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before
            return
        event: Any = torch.cuda.Event  # torch leaves its methods untyped
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def read(self, *names: str) -> dict[str, float]:
        """Seconds of each name, 0 where it did not run; counting starts again. Waits for the device."""
        found = {name: self._seconds.get(name, 0.0) for name in names}
        for name, start, end in self._events:
            end.synchronize()  # host sync
            found[name] += start.elapsed_time(end) / 1000
        self._seconds, self._events = {}, []
        return found
