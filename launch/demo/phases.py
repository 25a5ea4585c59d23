"""Times the phases of a long command, and measures the most memory that its processes held at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import psutil
from rich.console import Console

GIB = 2.0**30


class MemoryWatch:
    """A thread that samples the resident memory of a process tree, summed; pages shared by processes count twice.

    Args:
        others: further processes to count, such as a Ray head that is no child of ours.
        interval_s: seconds between samples.
    """

    def __init__(self, others: Callable[[], Iterable[psutil.Process]] = tuple, interval_s: float = 0.5) -> None:
        self.peak_bytes = 0
        self.others = others
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, self.sample())

    def sample(self) -> int:
        """Bytes held right now."""
        own = psutil.Process()
        found = {own.pid: own}
        with contextlib.suppress(psutil.Error):
            found |= {process.pid: process for process in own.children(recursive=True)}
        with contextlib.suppress(psutil.Error):
            found |= {process.pid: process for process in self.others()}
        total = 0
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def close(self) -> None:
        """Stop sampling, after a last look."""
        self.peak_bytes = max(self.peak_bytes, self.sample())
        self._stop.set()
        self._thread.join(timeout=5)

    @property
    def peak_gib(self) -> float:
        """Most memory seen, GiB."""
        return self.peak_bytes / GIB


class Phases:
    """Times named phases and says which of them found their work done.

    Attributes:
        seconds: phase to its duration.
        reused: phases whose work an earlier run had done.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Run one phase; its time is kept even when it fails."""
        self.console.print(f"[bold]{name}[/bold]  {title}")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)
        reused = " (reused)" if name in self.reused else ""
        self.console.print(f"  [green]done[/green] in {self.seconds[name]:.1f} s{reused}", highlight=False)

    def reuse(self, name: str, why: str) -> None:
        """Note that a phase has nothing to do."""
        self.reused.append(name)
        self.console.print(f"  reused: {why}", highlight=False)

    def line(self, text: str) -> None:
        """One line of a phase's own progress."""
        self.console.print(f"  {text}", highlight=False, markup=False)
