"""Manages the folder of one run: its attempts, progress file and metrics, written by rank 0 and read by anyone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from echox.errors import CheckpointError
from echox.files import append_line, parse_json, read_text, write_atomically
from echox.run_records import LARGEST_METRICS, Progress, read_progress

if TYPE_CHECKING:
    from echox.engine.object_store.run_store import RunStore

ATTEMPT = "attempt"
"""File or object that holds the number of the newest attempt."""


@dataclass(frozen=True)
class RunDir:
    """Names inside `<storage>/<run>`: `progress.json`, `metrics.jsonl`, `attempt`, `checkpoints/`, `log/`.

    Attributes:
        path: on this node.
        store: where the run lies if that is an object store; the count of attempts in it is the one that holds.
    """

    path: Path
    store: RunStore | None = None

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line: `step` and the metrics of that step, in order of step."""
        return self.path / "metrics.jsonl"

    @property
    def progress_path(self) -> Path:
        """The state of the run right now, as `write_progress` leaves it."""
        return self.path / "progress.json"

    def next_attempt(self) -> int:
        """Count and return the number of this attempt, from 1; rank 0 alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        attempt = self.last_attempt() + 1
        write_atomically(self.path / ATTEMPT, f"{attempt}\n")
        if self.store is not None:
            self.store.write(ATTEMPT, f"{attempt}\n".encode())
        return attempt

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first; what progress says, where a crash left the file empty."""
        try:
            here = int(read_text(self.path / ATTEMPT, 100))
        except FileNotFoundError:
            here = 0
        except ValueError:
            here = read_progress(self.path).get("attempt", 0)
        return here if self.store is None else max(here, newest_attempt(self.store))

    def check_attempt(self, attempt: int) -> None:
        """Raise CheckpointError when a newer attempt has begun: two processes must not publish for one run."""
        newest = self.last_attempt()
        if newest != attempt:
            raise CheckpointError(
                f"attempt {newest} of this run has begun, so attempt {attempt} may no longer save",
                where=str(self.path),
                fix="stop one of the two, or give one of them another name=",
            )

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics after `step` optimizer steps."""
        append_line(self.metrics_path, json.dumps({"step": step, **metrics}))

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again because the run resumes at `step`."""
        if not self.metrics_path.is_file():
            return
        kept = [line for line in read_text(self.metrics_path, LARGEST_METRICS).splitlines() if _step_of(line) <= step]
        write_atomically(self.metrics_path, "".join(line + "\n" for line in kept))

    def write_progress(
        self,
        *,
        stage: str,
        step: int,
        steps: int,
        state: str,
        attempt: int,
        loss: float | None = None,
        samples_per_s: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Replace the progress file; see `Progress`."""
        record: Progress = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "state": state,
            "attempt": attempt,
            "loss": loss,
            "samples_per_s": samples_per_s,
            "eta_s": eta_s,
            "time": time.time(),
        }
        write_atomically(self.progress_path, json.dumps(record), durable=False)


def newest_attempt(store: RunStore) -> int:
    """Number of the newest attempt at a run in a store, 0 before the first."""
    text = (store.read(ATTEMPT) or b"").strip()
    return int(text) if text.isdigit() else 0


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")  # A line cut short by a crash belongs to the steps that are done again.
