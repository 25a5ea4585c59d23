"""Times the steps between two reports, and splits wall time into waiting for data and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Wall and processor time of the steps since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._cpu_started = time.process_time()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count what happens inside as the wait for the data of one more step."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before
        self._steps += 1

    def cpu_s(self) -> float:
        """Processor seconds of this process a step, all its threads, since the last restart."""
        return (time.process_time() - self._cpu_started) / max(self._steps, 1)

    def read(self) -> tuple[float, float, float]:
        """Since the last restart: seconds, seconds a step, and the share of them spent waiting for data."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        return elapsed, elapsed / max(self._steps, 1), self._waited / elapsed
