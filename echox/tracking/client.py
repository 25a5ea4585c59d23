"""A tracker over `MlflowClient`: explicit run id, one background thread, and a spool when the server is away."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.tracking.names import METRICS_PER_BATCH, PARAMS_PER_BATCH, TAG_LIMIT, batches, flatten, metric_name
from echox.tracking.spool import Operation, Spool, operations, pending

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger("echox.tracking")

FLUSH_S = 2.0
RETRY_S = 30.0
FINISH_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Which MLflow run to write to; small and picklable, so that the driver can hand it to its workers.

    Attributes:
        uri: tracking URI.
        run_id: id of the run; None when the server could not be reached at the start.
        parent_id: id of the run that groups the stages.
        attempt: 1 for a fresh run, one more for each resume.
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
        return self.run_folder / "mlflow-spool"


def make_client(uri: str) -> MlflowClient:
    """A client whose requests give up within seconds; a slow server must not hold a training run."""
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def send(client: MlflowClient, run_id: str, operation: Operation, attempt: int) -> None:
    """Apply one operation to a run.

    A parameter that the run already has with another value cannot change; it becomes the tag `attempt.N.<key>`.
    """
    from mlflow.entities import Metric, Param, RunTag

    kind = operation["kind"]
    if kind == "metrics":
        rows = [Metric(key, value, when, step) for key, value, when, step in operation["items"]]
        for metrics in batches(rows, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=metrics)
    elif kind == "params":
        known = client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in operation["items"].items() if key not in known]
        for params in batches(fresh, PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params)
        changed = {key: value for key, value in operation["items"].items() if known.get(key, value) != value}
        tags = [RunTag(f"attempt.{attempt}.{key}", value[:TAG_LIMIT]) for key, value in changed.items()]
        for part in batches(tags, PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=part)
    elif kind == "tags":
        tags = [RunTag(key, value[:TAG_LIMIT]) for key, value in operation["items"].items()]
        client.log_batch(run_id, tags=tags)
    else:
        client.log_artifact(run_id, operation["path"], operation["folder"])


class MlflowTracker:
    """The engine's tracker protocol. Every method returns at once; a thread talks to the server.

    Args:
        handle: the run.
        writer: name of this writer's spool file; one a process.
        owner: whether `finish` also ends the MLflow run and delivers everything spooled; one process a run.
    """

    def __init__(self, handle: RunHandle, *, writer: str, owner: bool = False) -> None:
        self.handle = handle
        self._owner = owner
        self._spool = Spool(handle.spool_folder, writer)
        self._queue: queue.Queue[Operation | None] = queue.Queue()
        self._client: MlflowClient | None = None
        self._warned = False
        self._retry_at = 0.0 if handle.run_id else math.inf
        self._finished = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step; values are host numbers."""
        now = int(time.time() * 1000)
        items = [[metric_name(key), float(value), now, step] for key, value in metrics.items()]
        self._put({"kind": "metrics", "items": items})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings are flattened, known ones stay as they are."""
        self._put({"kind": "params", "items": flatten(params)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._put({"kind": "tags", "items": {metric_name(key): str(value) for key, value in tags.items()}})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach one file, below `folder` of the run's artifacts."""
        self._put({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is queued; the owner also delivers the spool and ends the run. Waits at most half a minute.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._finished:
            return
        self._finished = True
        self._queue.put(None)
        self._thread.join(FINISH_S)
        if self._owner and not self._thread.is_alive():
            closing = threading.Thread(target=self._close, args=(status,), name="mlflow-close", daemon=True)
            closing.start()
            closing.join(FINISH_S)

    def _put(self, operation: Operation) -> None:
        if not self._finished:
            self._queue.put(operation)

    def _work(self) -> None:
        """Collect operations for up to `FLUSH_S`, join their metrics, send; spool what cannot be sent."""
        closing = False
        while not closing:
            waiting = [self._queue.get()]
            deadline = time.monotonic() + FLUSH_S
            while waiting[-1] is not None and len(waiting) < METRICS_PER_BATCH:
                try:
                    waiting.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            closing = waiting[-1] is None
            for operation in _joined([item for item in waiting if item is not None]):
                self._deliver(operation)

    def _deliver(self, operation: Operation) -> None:
        if self.handle.run_id is None or time.monotonic() < self._retry_at:
            self._spool.append(operation)
            return
        try:
            self._client = self._client or make_client(self.handle.uri)
            send(self._client, self.handle.run_id, operation, self.handle.attempt)
        except Exception as error:
            self._spool.append(operation)
            self._retry_at = time.monotonic() + RETRY_S
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "MLflow at %s does not answer (%s); training goes on, metrics are kept in %s and sent when it is back",
                self.handle.uri,
                str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                self._spool.path.parent,
            )

    def _close(self, status: str) -> None:
        """Deliver every writer's spool, then end the run and bring the parent to the same state."""
        from echox.tracking.run import create_runs, end_runs

        try:
            client = make_client(self.handle.uri)
            handle = self.handle if self.handle.run_id else create_runs(client, self.handle)
            replay(client, handle)
            end_runs(client, handle, status)
        except Exception as error:
            self._warn(error)


def replay(client: MlflowClient, handle: RunHandle) -> int:
    """Send every spooled operation of a run and remove the files; returns how many were sent.

    An artifact whose file is gone is skipped. Errors of the server pass through and leave the file for the next try.
    """
    sent = 0
    for path in pending(handle.spool_folder):
        for operation in _joined(list(operations(path))):
            if operation["kind"] == "artifact" and not Path(operation["path"]).exists():
                continue
            assert handle.run_id is not None
            send(client, handle.run_id, operation, handle.attempt)
            sent += 1
        path.unlink()
    if sent:
        with contextlib.suppress(OSError):
            handle.spool_folder.rmdir()
    return sent


def _joined(waiting: list[Operation]) -> list[Operation]:
    """Metrics of neighbouring operations in one, so that a thousand values cost one request."""
    joined: list[Operation] = []
    for operation in waiting:
        if joined and operation["kind"] == joined[-1]["kind"] == "metrics":
            joined[-1] = {"kind": "metrics", "items": joined[-1]["items"] + operation["items"]}
        else:
            joined.append(operation)
    return joined
