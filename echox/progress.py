"""Prints the progress of a long command as lines on standard error, with a rate and the time left."""

from __future__ import annotations

import sys
import time

_SHOW_EVERY_S = 2.0


class Progress:
    """One line every two seconds and one at the end of each task."""

    def __init__(self) -> None:
        self._what = ""
        self._start = self._shown = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say that `done` of `total` parts of the task `what` are done; a new name starts a new task."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._shown = what, now, 0.0
        if now - self._shown < _SHOW_EVERY_S and done < total:
            return
        self._shown = now
        rate = done / max(now - self._start, 1e-9)
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if done and now > self._start else ""
        print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)
