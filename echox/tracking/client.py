"""Tracks runs with `MlflowClient`: explicit run ids, a journal that loses nothing, a thread that calls the server."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.tracking import spool
from echox.tracking.delivery import STAGE, Delivery, NotYet, first_line
from echox.tracking.lifecycle import create_runs, finish_pending, make_client
from echox.tracking.names import flatten, metric_name
from echox.tracking.spool import Operation, Spool
from echox.tracking.state import (
    SPOOL_FOLDER,
    Process,
    announce_attempt,
    announced_attempt,
    end_state,
    read_state,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("echox.tracking")

FLUSH_S = 2.0
RETRY_S = 30.0
ARTIFACT_RETRY_S = 60.0
DISK_RETRY_S = 1.0
FINISH_S = 30.0
"""How long the owner waits at the end; other processes wait a third, for the owner takes over what they leave."""
QUEUE_LIMIT = 20_000
"""Calls that may wait for a disk that hangs or is full; memory is bounded, so those beyond are dropped and counted."""
EARLY_LIMIT = 1000
"""System samples that may wait to learn which attempt they belong to."""
FIRST_RANK = "rank0"
"""Role of the process that begins attempts; those of other nodes follow it."""
_SYSTEM = "system/"


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Which MLflow run to write to; small and picklable, so that the driver can hand it to its workers.

    Attributes:
        uri: tracking URI.
        run_id: id of the run; None when the server could not be reached at the start.
        parent_id: id of the run that groups the stages.
        attempt: number of the first attempt that this start of the run makes; 1 for a fresh run.
        run_folder: folder of the run, seen by every node; the spool lies below it.
    """

    uri: str
    run_id: str | None
    parent_id: str | None
    attempt: int
    run_folder: Path

    @property
    def spool_folder(self) -> Path:
        """Where undelivered operations wait."""
        return self.run_folder / SPOOL_FOLDER


class MlflowTracker:
    """The engine's tracker protocol. Every method but `finish` returns at once.

    One thread writes what was called to the process's journal, another sends the journal to the server and tries again
    when it does not answer.

    Args:
        handle: the run.
        writer: name of this process's role, such as rank0; one living process a role.
        owner: whether this process creates the MLflow runs and ends them; one process a run.
    """

    def __init__(self, handle: RunHandle, *, writer: str, owner: bool = False) -> None:
        self.handle = handle
        self.contacted = threading.Event()
        """Set when the server has answered, or has failed to for the first time."""
        self._owner = owner
        self._follows = not owner and writer != FIRST_RANK
        self._spool = Spool(handle.spool_folder, writer)
        self._queue: queue.SimpleQueue[Callable[[], list[Operation]] | None] = queue.SimpleQueue()
        self._early: deque[Operation] = deque(maxlen=EARLY_LIMIT)
        self._attempt: int | None = None
        self._dropped = 0
        self._warned = False
        self._finished = False
        self._created = not owner
        self._client: MlflowClient | None = None
        self._delivery: Delivery | None = None
        self._artifacts_tried = time.monotonic()
        self._written = threading.Event()
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)
        self._writer = threading.Thread(target=self._write, name="mlflow-journal", daemon=True)
        self._sender.start()
        self._writer.start()

    @property
    def in_one_file(self) -> bool:
        """Whether the store is a SQLite file."""
        return self.handle.uri.startswith("sqlite:")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step; values are host numbers.

        They go to the stage run and to the attempt that has begun; names that start with `system/` to the latter alone.
        """
        values, now = dict(metrics), time.time()
        self._put(lambda: self._metrics(values, step, now))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings are flattened, known ones stay as they are."""
        self._put(
            lambda: [{"kind": "params", "items": flatten(params), "attempt": self._attempt or self.handle.attempt}]
        )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the stage run."""
        items = _named(tags)
        self._put(lambda: [{"kind": "tags", "items": items}])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach one file, below `folder` of the run's artifacts."""
        operation = {"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder}
        self._put(lambda: [operation])

    def begin_attempt(self, attempt: int, step: int, tags: Mapping[str, str]) -> None:
        """Open the child run of an attempt that goes on from `step`; an earlier one still RUNNING becomes FAILED.

        The attempts of other nodes' trackers follow, so only the first rank calls this.
        """
        operation = {
            "kind": "begin",
            "attempt": attempt,
            "tags": {**_named(tags), "from_step": str(step)},
            "time": int(time.time() * 1000),
        }
        self._put(lambda: self._begin(operation))

    def end_attempt(self, status: str, tags: Mapping[str, str]) -> None:
        """End the attempt's child run as FINISHED, FAILED or KILLED, with tags that say why."""
        operation = {"kind": "end", "status": status, "tags": _named(tags), "time": int(time.time() * 1000)}
        self._put(lambda: [] if self._attempt is None else [{**operation, "attempt": self._attempt}])

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is recorded; the owner also delivers what other processes left, and ends the runs.

        Waits at most half a minute; what a slow server has not taken by then, the run's watcher goes on to deliver.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._finished:
            return
        self._finished = True
        if self._owner:
            with contextlib.suppress(OSError):  # a full disk, or a folder that was moved aside
                end_state(self.handle.run_folder, status)
        self._queue.put(None)
        self._sender.join(FINISH_S if self._owner else FINISH_S / 3)
        if self._dropped:
            log.warning(
                "%d records of %s were dropped: %s could not be written",
                self._dropped,
                self.handle.run_folder.name,
                self.handle.spool_folder,
            )

    def _put(self, call: Callable[[], list[Operation]]) -> None:
        if self._finished:
            return
        if self._queue.qsize() >= QUEUE_LIMIT:
            self._dropped += 1
            return
        self._queue.put(call)

    # The journal's thread.

    def _write(self) -> None:
        """Turn calls into operations and put them into the journal, as many as wait at once."""
        closing = False
        while not closing:
            calls = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while calls[-1] is not None and len(calls) < QUEUE_LIMIT:
                    calls.append(self._queue.get_nowait())
            closing = calls[-1] is None
            operations = [item for call in calls for item in (self._late_samples() if call is None else call())]
            self._append(operations, closing)
        self._closing.set()
        self._written.set()

    def _append(self, operations: list[Operation], closing: bool) -> None:
        """Write to the journal until the disk takes it, but at the end of the process only once."""
        disk_warned = False
        while operations:
            try:
                self._spool.append(operations)
            except OSError as error:
                if not disk_warned:
                    log.warning("%s cannot be written (%s); training goes on", self.handle.spool_folder, error)
                disk_warned = True
                if closing or self._finished:
                    self._dropped += len(operations)
                    return
                time.sleep(DISK_RETRY_S)
                continue
            self._written.set()
            return

    def _metrics(self, values: Mapping[str, float], step: int, when: float) -> list[Operation]:
        now = int(when * 1000)
        rows = [[metric_name(key), float(value), now, step] for key, value in values.items()]
        system = [row for row in rows if str(row[0]).startswith(_SYSTEM)]
        own = [row for row in rows if not str(row[0]).startswith(_SYSTEM)]
        found: list[Operation] = []
        if own:
            runs = [STAGE] if self._attempt is None else [STAGE, self._attempt]
            found.append({"kind": "metrics", "runs": runs, "items": own})
        if system:
            self._early.append({"kind": "metrics", "items": system})
            found += self._known_samples()
        return found

    def _begin(self, operation: Operation) -> list[Operation]:
        self._attempt = operation["attempt"]
        announce_attempt(self.handle.run_folder, operation["attempt"])
        return [operation, *self._known_samples()]

    def _known_samples(self) -> list[Operation]:
        """System samples that can be sent now that the attempt is known."""
        if self._attempt is None and self._follows:
            self._attempt = announced_attempt(self.handle.run_folder)
        if self._attempt is None:
            return []
        found = [{**sample, "runs": [self._attempt]} for sample in self._early]
        self._early.clear()
        return found

    def _late_samples(self) -> list[Operation]:
        """At the end: samples of a run that has no attempts go to the stage run."""
        return self._known_samples() + [{**sample, "runs": [STAGE]} for sample in self._early]

    # The sender's thread.

    def _send(self) -> None:
        """Deliver now and then until the tracker closes, and once more then; later and later after failures."""
        delay = 0.0
        while True:
            closing = self._closing.is_set()
            try:
                self._deliver(last=closing)
                self._warned, delay = False, 0.0
            except NotYet:
                delay = FLUSH_S
            except Exception as error:
                self._client = self._delivery = None
                delay = min(RETRY_S, 2 * delay or 1.0)
                self._warn(error)
            self.contacted.set()
            if closing:
                return
            if delay:
                self._closing.wait(delay)
            else:
                self._written.wait()
                self._closing.wait(FLUSH_S)  # joins what is recorded meanwhile

    def _deliver(self, *, last: bool) -> None:
        self._written.clear()
        self._client = self._client or make_client(self.handle.uri)
        folder = self.handle.run_folder
        if not self._created:
            made = create_runs(self._client, folder)
            self.handle, self._created = replace(self.handle, run_id=made[0], parent_id=made[1]), True
        run_id: str | None = self.handle.run_id or read_state(folder).get("run_id")
        if run_id is None:
            raise NotYet
        if self._delivery is None:
            self._delivery = Delivery(self._client, run_id)
        for path in [*self._spool.inherited(), self._spool.path]:
            if path == self._spool.path and not last:
                self._deliver_own()
            else:
                self._delivery.send_file(path)
        if last or time.monotonic() - self._artifacts_tried > ARTIFACT_RETRY_S:
            self._artifacts_tried = time.monotonic()
            self._delivery.send_postponed(self.handle.spool_folder)
        if last and self._owner:
            finish_pending(self._client, folder, Process.current())

    def _deliver_own(self) -> None:
        """Send what is new in this process's journal, which goes on being written."""
        assert self._delivery is not None
        while True:
            found, offset = spool.read(self._spool.path)
            if not found:
                return
            self._delivery.send_all(found, self.handle.spool_folder)
            spool.confirm(self._spool.path, offset)

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        log.warning(
            "MLflow at %s cannot be served (%s); training goes on, metrics are kept in %s and sent when it is back",
            self.handle.uri,
            first_line(error),
            self.handle.spool_folder,
        )


def _named(tags: Mapping[str, str]) -> dict[str, str]:
    return {metric_name(key): str(value) for key, value in tags.items()}
