"""Writes the driver's events of a run (`<run>/log/*.jsonl`), and reads those of all processes, merged by time."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from echox import run_records
from echox.files import is_within, open_regular, parse_json, read_lines
from echox.run_records import Progress

LOG = "log"
DRIVER_FILE = "driver.jsonl"
FAILED = "failed"
"""The engine's event of a rank that ends with an error."""
FAILURES = ("job_failure", "job_driver_lost", "job_failed")
"""The job's own: of a group of workers and what was decided, of the driver, and the one that ended the job."""
ENDS = ("job_failed", "job_aborted")
"""A driver's last event where it did not succeed: an error of the user's, or signals that left nothing to save."""
MORE_ROOM = "the cluster has room for more workers"
"""How a request to stop begins that is made only to go on with more workers."""
_BLOCK = 4 << 20
"""Bytes read at a time, and the longest line."""
_LAST_TIME = 1e11
_OWN = ("time", "event", "rank", "step", "attempt")


class JobEvent(TypedDict):
    """One line of `<run>/log/*.jsonl`; events have further values of their own.

    Attributes:
        time: Unix time, seconds.
        event: its name; those of the driver begin with `job_`.
        rank: of the worker, or "driver".
        step, attempt: where the run stood.
        error: of a failure, in a sentence.
        kind, failed_rank, decision: of a group of workers that failed: see `Cause`, and what was decided.
        start_s: of `start`: seconds of each part of the worker's start.
        why: of a stop, its reason.
        status: of the driver's end: FINISHED, FAILED or KILLED.
    """

    time: float
    event: str
    rank: int | str
    step: int
    attempt: int
    error: NotRequired[str]
    kind: NotRequired[str]
    failed_rank: NotRequired[int | None]
    decision: NotRequired[str]
    start_s: NotRequired[dict[str, float]]
    why: NotRequired[str]
    status: NotRequired[str]


class JobLog:
    """Events of the driver and its controller: one line on stdout, one JSON line in `<run>/log/driver.jsonl`."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.path = run_folder / LOG / DRIVER_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: str, **values: Any) -> None:
        """Write `event=job_<event> run=... key=value`; step and attempt are those that the workers reported last."""
        progress = read_progress(self.run_folder)
        stands_at = {"step": progress.get("step", 0), "attempt": progress.get("attempt", 0)}
        record = {"time": round(time.time(), 3), "event": f"job_{event}", "rank": "driver", **stands_at, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
        pairs = " ".join(f"{key}={_shown(value)}" for key, value in {**stands_at, **values}.items())
        print(f"event=job_{event} run={self.run_folder.name} {pairs}", flush=True)


def read_progress(run_folder: Path) -> Progress:
    """The engine's progress record; empty if there is none."""
    return run_records.read_progress(run_folder)


def read_events(run_folder: Path) -> list[JobEvent]:
    """Every event of a run, of all ranks, attempts and the driver, by time; a line cut short by a crash is left out."""
    found: list[JobEvent] = []
    for path in _logs(run_folder):
        found += _of_file(path)
    return sorted(found, key=lambda event: event["time"])


def driver_events(run_folder: Path) -> list[JobEvent]:
    """The job's own events, without those of the ranks, which may be many."""
    return [event for path in _logs(run_folder) if path.name == DRIVER_FILE for event in _of_file(path)]


def follow_events(run_folder: Path, going_on: Callable[[], bool], poll_s: float = 0.5) -> Iterator[JobEvent]:
    """Events as they are written, beginning with those there are, until `going_on` says no."""
    offsets: dict[Path, int] = {}
    while True:
        last_round = not going_on()
        fresh: list[JobEvent] = []
        for path in _logs(run_folder):
            with contextlib.suppress(OSError), open_regular(path) as file:
                while block := os.pread(file, _BLOCK, offsets.get(path, 0)):
                    whole, newline, rest = block.rpartition(b"\n")
                    if not newline and len(rest) < _BLOCK:
                        break
                    # A line longer than a block is none of ours, and is passed over.
                    offsets[path] = offsets.get(path, 0) + (len(whole) + 1 if newline else _BLOCK)
                    fresh += _parsed(whole.splitlines())
        yield from sorted(fresh, key=lambda event: event["time"])
        if last_round:
            return
        time.sleep(poll_s)


def is_error(event: JobEvent) -> bool:
    """Whether an event reports a failure."""
    return event["event"] in (FAILED, *FAILURES)


def line(event: JobEvent) -> str:
    """An event for people: `12:00:03.512 rank=1 step=7 attempt=2 failed error="..."`."""
    when = time.strftime("%H:%M:%S", time.localtime(event["time"])) + f"{event['time'] % 1:.3f}"[1:]
    rest = " ".join(f"{key}={_shown(value)}" for key, value in event.items() if key not in _OWN)
    stands_at = " ".join(f"{key}={value}" for key, value in event.items() if key in ("rank", "step", "attempt"))
    return f"{when} {stands_at} {event['event']} {rest}".rstrip()


def _logs(run_folder: Path) -> list[Path]:
    """The event files of a run; links out of its folder are left out, for the folder may be someone else's."""
    return [path for path in sorted((run_folder / LOG).glob("*.jsonl")) if is_within(run_folder, path)]


def _of_file(path: Path) -> list[JobEvent]:
    """What a log holds, up to the first line that is far too long to be an event."""
    found: list[JobEvent] = []
    with contextlib.suppress(OSError, ValueError):
        for line in read_lines(path, _BLOCK):
            found += _parsed([line])
    return found


def _parsed(lines: Iterable[bytes]) -> list[JobEvent]:
    found = []
    for raw in lines:
        try:
            event = parse_json(raw.decode("utf-8", errors="replace"))
        except ValueError:
            continue
        if isinstance(event, dict) and _well_formed(event):
            found.append(cast(JobEvent, event))
    return found


def _well_formed(event: dict[str, Any]) -> bool:
    """Whether the fields that every reader uses are of their types; those that few use are taken out where not."""
    spent = event.get("start_s", {})
    if not isinstance(spent, dict) or not all(isinstance(value, int | float) for value in spent.values()):
        del event["start_s"]
    when = event.get("time")
    return (
        isinstance(when, int | float)
        and 0 <= when < _LAST_TIME
        and isinstance(event.get("event"), str)
        and all(isinstance(event.setdefault(name, 0), int) for name in ("step", "attempt"))
        and isinstance(event.setdefault("rank", "?"), int | str)
    )


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text else text
