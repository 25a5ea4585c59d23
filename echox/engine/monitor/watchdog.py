"""Detects a step that takes far too long: every rank dumps its threads' stacks, then ends, so that the run restarts."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

HUNG = 75
"""Exit code of a process that gave up waiting (EX_TEMPFAIL: trying again may help)."""
_REMEMBERED = 64
_NEEDED = 8
_OTHERS_S = 5.0
"""The first rank to leave ends the others: until then each must have had the time to write its stacks."""


class Watchdog:
    """Times the stretches between beats against a running quantile, in a thread of its own.

    Args:
        folder: where stacks go, `attempt-<n>-step-<s>-rank-<r>.txt`.
        name: `attempt-<n>`-like beginning of the files' names.
        rank: of this process.
        factor: how many times the 95th percentile of recent steps one may take; 0 never gives up.
        least_s: no stretch shorter than that is a hang, and nothing is known before some steps were timed.
        report: told of a hang before the process ends: seconds waited, and the file with the stacks.
        leave: ends the process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        rank: int,
        factor: float,
        least_s: float,
        report: Callable[[float, Path], None],
        leave: Callable[[], None] = lambda: os._exit(HUNG),
    ) -> None:
        self._folder, self._name, self._rank = folder, name, rank
        self._factor, self._least_s = factor, least_s
        self._report, self._leave = report, leave
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._began = time.monotonic()
        self._step = 0
        self._timed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if factor:
            self._thread.start()

    def beat(self, step: int, *, timed: bool) -> None:
        """Begin a stretch: a training step (`timed`), or something else that has no usual length."""
        now = time.monotonic()
        if self._timed:
            self._took.append(now - self._began)
        self._began, self._step, self._timed = now, step, timed

    def limit_s(self) -> float:
        """Seconds that the present stretch may take."""
        if not self._timed or len(self._took) < _NEEDED:
            return 10 * self._least_s
        took = sorted(self._took)
        return max(self._least_s, self._factor * took[int(0.95 * (len(took) - 1))])

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least_s / 4)):
            waited = time.monotonic() - self._began
            if waited > self.limit_s():
                self._report(waited, self._dump())
                self._closed.wait(_OTHERS_S)
                self._leave()
                return

    def _dump(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}-step-{self._step:08d}-rank-{self._rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        _dump_flight_recorder(path.with_suffix(".nccl"))
        return path


def _dump_flight_recorder(path: Path) -> None:
    """NCCL's last collectives, where a GPU is in use."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        path.write_bytes(dump())
