"""Times the phases of a process's start."""

from __future__ import annotations

import time

import psutil


class StartupTimer:
    """Seconds between named points of a process's life; the first one, `imports`, has passed when it is made.

    Attributes:
        seconds: by name, in order.
    """

    def __init__(self) -> None:
        self.seconds = {"imports": round(time.time() - psutil.Process().create_time(), 2)}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What has passed since the last point."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now
