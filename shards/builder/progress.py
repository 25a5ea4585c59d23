"""Reports how far a build has come: utterances, hours, rate, time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from shards.corpus import Utterance

_SHOW_EVERY_S = 2.0


class Meter:
    """Counts what is done, and reports it every two seconds.

    Args:
        name: of the corpus.
        utterances: all that are to be converted; counted in the background, for the time that is left.
        say: called with one line.

    Attributes:
        seen: utterances done.
        rejected: bad ones among them.
        counting: the thread that counts.
    """

    def __init__(self, name: str, utterances: Callable[[], Iterator[Utterance]], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self.seen = self.rejected = self._fresh = 0
        self._seconds = 0.0
        self._total: int | None = None
        self._start = self._shown = time.monotonic()

        def count() -> None:
            try:
                self._total = sum(1 for _ in utterances())
            except Exception:
                # The build meets the same error and reports it; only the time left stays unknown.
                return

        self.counting = threading.Thread(target=count, daemon=True, name="count")
        self.counting.start()

    def add(self, record: dict[str, Any], utterances: int, *, kept: bool) -> None:
        """Count a shard: its record, how many utterances it was made from, whether an earlier run had made it."""
        self.seen += utterances
        self.rejected += len(record["rejected"])
        self._seconds += record["question_s"] + record["answer_s"]
        self._fresh += 0 if kept else utterances
        now = time.monotonic()
        if now - self._shown < _SHOW_EVERY_S:
            return
        self._shown = now
        rate = self._fresh / (now - self._start)
        total = "" if self._total is None else f" of {self._total:,}"
        left = "" if self._total is None or not rate else f", {(self._total - self.seen) / rate:.0f} s left"
        self._say(
            f"{self._name}: {self.seen:,}{total} utterances, {self._seconds / 3600:.2f} h, {rate:.1f}/s{left}, "
            f"{self.rejected:,} rejected"
        )
