"""Logs each event of a run in one vocabulary, as a line for people and a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echox.files import append_line


class EventLog:
    """Writes `event, rank, step, attempt, key=value` to stderr (rank 0 alone) and to `<run>/log/rank-NNNNN.jsonl`."""

    def __init__(self, run_folder: Path, *, rank: int, attempt: int) -> None:
        self.rank = rank
        self.attempt = attempt
        self._lost = False
        self.path = run_folder / "log" / f"rank-{rank:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: str, *, step: int, aside: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Write one event; `step` is the number of optimizer steps done; `aside` goes into the JSON line alone."""
        record = {"event": event, "rank": self.rank, "step": step, "attempt": self.attempt}
        line = json.dumps({"time": round(time.time(), 3), **record, **values, **(aside or {})}, default=str)
        try:
            append_line(self.path, line)
        except OSError as error:
            self.lose(error)
        if self.rank == 0:
            pairs = " ".join(f"{key}={_short(value)}" for key, value in values.items())
            line = f"{time.strftime('%H:%M:%S')} {event} step={step} attempt={self.attempt} {pairs}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def lose(self, error: OSError) -> None:
        """Say once that what a run reports could not be written: a full disk must not end a run for that."""
        if not self._lost:
            self._lost = True
            print(
                f"warning: rank {self.rank} cannot write its log, training goes on: {error}",
                file=sys.stderr,
                flush=True,
            )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return f'"{text}"' if " " in text else text
