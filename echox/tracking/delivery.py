"""Sends operations to MLflow runs: each metric point once, every attempt a child run, whatever was sent before.

MLflow never forgets a point, so a step that is done again after a resume would put a second value beside the first and
the stage run's chart would run back and forth. A run therefore takes only steps beyond the last that it has of a
metric: the stage run shows each step as it was done first, and each attempt's child all that the attempt did. The same
rule makes a delivery that was cut in the middle safe to repeat.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from echox.config.locations import without_secrets
from echox.files import is_within, write_atomically
from echox.tracking import spool
from echox.tracking.names import METRICS_PER_BATCH, PARAMS_PER_BATCH, TAG_LIMIT, batches
from echox.tracking.spool import Operation

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger("echox.tracking")

STAGE = "stage"
"""The target of operations for the stage run; others are numbers of attempts."""
ROLE = "role"
"""Tag that tells a child that is an attempt from one that is a stage."""


class NotYet(Exception):
    """The child run of the attempt does not exist so far; the first rank makes it."""


@dataclass(frozen=True)
class _Latest:
    step: int
    finite: bool


class Delivery:
    """Sends operations to one stage run and its attempts.

    Args:
        client: the server.
        run_id: the stage run.
        final: whether no other process will make a missing attempt's child, so that this does.
        within: folder of a run of someone else: its journal can name any file as an artifact and its store any place
            to put it, so only its own files are stored, and not elsewhere on this machine. None: the run is ours.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, final: bool = False, within: Path | None = None) -> None:
        self._client = client
        self._run_id = run_id
        self._final = final
        self._within = within
        self._children: dict[int, str] = {}
        self._latest: dict[str, dict[str, _Latest]] = {}
        self._refusals = 0
        self._artifacts_wait = False

    def send(self, operation: Operation) -> None:
        """Apply one operation; applying it again changes nothing.

        Raises:
            NotYet: its attempt has no run so far.
            Exception: whatever MLflow raises.
        """
        kind = operation["kind"]
        if kind == "metrics":
            for target in operation["runs"]:
                self._metrics(self._target(target), operation["items"])
        elif kind == "params":
            self._params(operation)
        elif kind == "tags":
            self._tags(self._run_id, operation["items"])
        elif kind == "begin":
            self._begin(operation)
        elif kind == "end":
            run_id = self._target(operation["attempt"])
            self._tags(run_id, operation["tags"])
            self._client.set_terminated(run_id, operation["status"], end_time=operation["time"])
        elif Path(operation["path"]).exists():
            self._check_artifact(Path(operation["path"]))
            self._client.log_artifact(self._run_id, operation["path"], operation["folder"])

    def send_file(self, path: Path) -> int:
        """Send what a journal holds, confirm it, and remove the file; returns the number of operations.

        What the server refuses for good is kept beside it.
        """
        sent = 0
        while True:
            found, offset = spool.read(path)
            if not found:
                spool.remove(path)
                return sent
            sent += self.send_all(found, path.parent)
            spool.confirm(path, offset)

    def send_all(self, operations: Iterable[Operation], folder: Path) -> int:
        """Send operations in order, neighbouring metrics of the same runs together.

        An artifact goes to a store of its own, which may be away or closed to us for as long as it likes: it is put
        aside, and what comes after it is sent.
        """
        sent = 0
        for operation in joined(operations):
            try:
                self.send(operation)
            except Exception as error:
                if not refused(error):
                    if operation["kind"] != "artifact":
                        raise
                    spool.postpone(folder, operation)
                    self._say_that_artifacts_wait(operation, error)
                    sent += 1
                    continue
                spool.keep_refused(folder, operation)
                if not self._refusals:
                    log.warning("MLflow refuses a part of the run, which is kept in %s: %s", folder, error)
                self._refusals += 1
            sent += 1
        return sent

    def send_postponed(self, folder: Path, *, of_all: bool = False) -> int:
        """Try artifacts again that were put aside, up to the first that still fails; returns how many were sent."""
        sent = 0
        for path in spool.postponed(folder, of_all=of_all):
            waiting = spool.read_postponed(path)
            for number, operation in enumerate(waiting):
                try:
                    self.send(operation)
                except Exception as error:
                    write_atomically(path, "".join(json.dumps(each) + "\n" for each in waiting[number:]))
                    self._say_that_artifacts_wait(operation, error)
                    return sent
                sent += 1
            spool.remove(path)
        return sent

    def _say_that_artifacts_wait(self, operation: Operation, error: Exception) -> None:
        if not self._artifacts_wait:
            why = first_line(error)
            log.warning("artifact %s was not stored (%s): it waits, and metrics go on", operation["path"], why)
        self._artifacts_wait = True

    def end_attempts(self, status: str, *, since: int) -> None:
        """End the children that are still RUNNING: the last as `status`, if it is of number `since` or later.

        Those before it died, or the next one would not have begun.
        """
        children = self._attempts()
        for number, child in children.items():
            if child.info.status == "RUNNING":
                lives = number >= since and number == max(children)
                self._client.set_terminated(child.info.run_id, status if lives else "FAILED")

    def _metrics(self, run_id: str, items: list[list[Any]]) -> None:
        from mlflow.entities import Metric

        latest = self._latest.get(run_id)
        if latest is None:
            known = self._client.get_run(run_id).data._metric_objs
            latest = {metric.key: _Latest(metric.step, math.isfinite(metric.value)) for metric in known}
        seen, rows = dict(latest), []
        for key, value, when, step in items:
            before = seen.get(key)
            # A value that was no number does not stand in the way of the one that replaces it.
            if before is None or step > before.step or (step == before.step and not before.finite):
                rows.append(Metric(key, value, when, step))
                seen[key] = _Latest(step, math.isfinite(value))
        self._latest.pop(run_id, None)  # after a batch that failed, the server says what it has
        for part in batches(rows, METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=part)
        self._latest[run_id] = seen

    def _params(self, operation: Operation) -> None:
        """A parameter that the run has with another value cannot change; it becomes the tag `attempt.N.<key>`."""
        from mlflow.entities import Param

        items: dict[str, str] = operation["items"]
        known = self._client.get_run(self._run_id).data.params
        fresh = [Param(key, value) for key, value in items.items() if key not in known]
        for params in batches(fresh, PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params)
        changed = {key: value for key, value in items.items() if known.get(key, value) != value}
        self._tags(self._run_id, {f"attempt.{operation['attempt']}.{key}": value for key, value in changed.items()})

    def _tags(self, run_id: str, items: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value[:TAG_LIMIT]) for key, value in items.items()]
        for part in batches(tags, PARAMS_PER_BATCH):
            self._client.log_batch(run_id, tags=part)

    def _begin(self, operation: Operation) -> None:
        """Make the attempt's child; an earlier one that is still RUNNING has died."""
        attempt: int = operation["attempt"]
        children = self._attempts()
        for number, child in children.items():
            if number < attempt and child.info.status == "RUNNING":
                self._client.set_terminated(child.info.run_id, "FAILED", end_time=operation["time"])
        if attempt not in children:
            self._children[attempt] = self._create(attempt, operation["tags"], operation["time"])
        self._reopen()
        step = operation["tags"].get("from_step", "0")
        self._tags(self._run_id, {"attempt": str(attempt), f"attempt.{attempt}.from_step": step})

    def _check_artifact(self, path: Path) -> None:
        if self._within is None:
            return
        if not is_within(self._within, path):
            raise PermissionError(f"{path} is no file of the run in {self._within}")
        place = urlsplit(str(self._client.get_run(self._run_id).info.artifact_uri))
        if place.scheme in ("", "file") and not is_within(self._within.resolve().parent, Path(unquote(place.path))):
            raise PermissionError(f"the run in {self._within} wants its artifacts in {place.path}, outside its storage")

    def _reopen(self) -> None:
        """A watcher that was at work when the run went on may have ended it a moment too late."""
        stage = self._client.get_run(self._run_id)
        parent_id = stage.data.tags.get("mlflow.parentRunId")
        for run in (stage, *([] if parent_id is None else [self._client.get_run(parent_id)])):
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")

    def _create(self, attempt: int, tags: Mapping[str, str], when: int | None = None) -> str:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

        stage = self._client.get_run(self._run_id)
        name = f"{stage.info.run_name}-attempt-{attempt}"
        handed_down = {key: stage.data.tags[key] for key in ("scale", "stage", MLFLOW_USER) if key in stage.data.tags}
        own = {MLFLOW_RUN_NAME: name, MLFLOW_PARENT_RUN_ID: self._run_id, ROLE: "attempt", "attempt": str(attempt)}
        made = self._client.create_run(
            stage.info.experiment_id,
            start_time=when,
            tags={**handed_down, **{key: value[:TAG_LIMIT] for key, value in tags.items()}, **own},
            run_name=name,
        )
        return str(made.info.run_id)

    def _attempts(self) -> dict[int, Run]:
        """The children of the stage run by number of attempt."""
        found = attempts_of(self._client, self._client.get_run(self._run_id))
        self._children = {number: child.info.run_id for number, child in found.items()}
        return found

    def _target(self, target: str | int) -> str:
        if target == STAGE:
            return self._run_id
        attempt = int(target)
        if attempt not in self._children:
            self._attempts()
        if attempt not in self._children:
            if not self._final:
                raise NotYet
            self._children[attempt] = self._create(attempt, {})
        return self._children[attempt]


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type; without secrets."""
    lines = str(error).splitlines()
    return without_secrets(lines[0])[:200] if lines else type(error).__name__


def attempts_of(client: MlflowClient, stage: Run) -> dict[int, Run]:
    """The attempts of a stage run by number."""
    wanted = f"tags.`mlflow.parentRunId` = '{stage.info.run_id}' and tags.`{ROLE}` = 'attempt'"
    found: dict[int, Run] = {}
    token = None
    while True:
        page = client.search_runs([stage.info.experiment_id], wanted, order_by=["start_time ASC"], page_token=token)
        for run in page:
            found.setdefault(int(run.data.tags["attempt"]), run)
        token = page.token
        if not token:
            return found


def refused(error: Exception) -> bool:
    """Whether trying again cannot succeed: the server calls the operation wrong, or a file cannot be read or stored."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return str(error.error_code) == "INVALID_PARAMETER_VALUE"
    return isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError)


def joined(operations: Iterable[Operation]) -> list[Operation]:
    """Metrics of neighbouring operations for the same runs in one, so that a thousand values cost one request."""
    found: list[Operation] = []
    for operation in operations:
        last = found[-1] if found else None
        if last and operation["kind"] == last["kind"] == "metrics" and operation["runs"] == last["runs"]:
            found[-1] = {**last, "items": last["items"] + operation["items"]}
        else:
            found.append(operation)
    return found
