"""Reports what is known of a run: from its job, and from its folder where that can be seen from here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, cast

from echox.config.paths import is_url
from echox.config.schema import Recipe
from echox.engine.checkpoint.manifest import newest_manifest
from echox.engine.object_store.reading import bring_checkpoints, local_logs
from echox.errors import LaunchError
from echox.run_records import Progress
from launch import paths
from launch.client.follow import describe
from launch.client.jobs import Job
from launch.client.startup_report import describe as describe_start
from launch.client.startup_report import start_up
from launch.events import FAILED, FAILURES, JobEvent, is_error, line, read_events, read_progress
from launch.job.failure_cause import lost_peer


class CheckpointAge(TypedDict):
    """Folder of a run's newest checkpoint, and the seconds since it was published."""

    path: str
    age_s: float


class Failure(TypedDict):
    """The last failure of a run: when, in which attempt, at which step, why, and what was decided."""

    time: float
    attempt: int
    step: int
    error: str | None
    decision: str | None


class RunStatus(Progress):
    """What a run's folder says: its progress, newest checkpoint, last failure, and the seconds of its last start."""

    folder: str
    checkpoint: CheckpointAge | None
    failure: Failure | None
    start_s: dict[str, float]


def locate(run: str, jobs: Iterable[Job] = ()) -> Path | None:
    """The folder of a run given as a folder, a job or a name; None where it cannot be seen from here.

    Args:
        run: folder, URL, submission id or run name.
        jobs: of the cluster, which say where their runs lie.
    """
    if is_url(run):
        return local_copy(run)
    given = [Path(run).expanduser()] if os.sep in run or Path(run).is_dir() else []
    known = [local_copy(job["folder"]) for job in jobs if run in (job["id"], job["run"]) and job.get("folder")]
    usual = [paths.home() / str(Recipe.model_fields["storage"].default) / run]
    for folder in (*given, *reversed(known), *usual):
        if folder.is_dir():
            return folder.absolute()
    return None


def local_copy(run: str) -> Path:
    """The folder of a run, or this machine's copy of its logs and manifests."""
    if is_url(run):
        bring_checkpoints(run, whole=False)
    return local_logs(run)


def resolved_recipe(run: str, jobs: Iterable[Job] = ()) -> Path:
    """The recipe that a run's folder holds.

    Raises:
        LaunchError: the folder cannot be seen from here, or has none.
    """
    folder = locate(run, jobs)
    if folder is None:
        raise LaunchError(
            f"the folder of run {run} was not found",
            fix="name the folder itself, such as /shared/runs/demo-s2t, where the storage can be seen",
        )
    file = folder / paths.RESOLVED
    if not file.is_file():
        raise LaunchError(f"no job has run in {folder} yet: it has no {paths.RESOLVED}", fix="submit its recipe")
    return file


def run_status(folder: Path, submitted: float | None = None) -> RunStatus:
    """Progress, last checkpoint, last failure and where the start went: what a run's folder says.

    Args:
        folder: of the run.
        submitted: Unix time at which the cluster took its job.
    """
    progress = read_progress(folder)
    events = read_events(folder)
    start_s = {name: round(value, 1) for name, value in start_up(events, submitted).items()}
    return {
        "folder": str(folder),
        **progress,
        "checkpoint": _checkpoint(folder),
        "failure": _last_failure(events),
        "start_s": start_s,
    }


def _checkpoint(folder: Path) -> CheckpointAge | None:
    newest = newest_manifest(folder)
    if newest is None:
        return None
    return {"path": str(newest.parent), "age_s": round(time.time() - newest.stat().st_mtime, 1)}


def _last_failure(events: Iterable[JobEvent]) -> Failure | None:
    last = next((event for event in reversed(list(events)) if event["event"] in FAILURES), None)
    if last is None:
        return None
    return {
        "time": last["time"],
        "attempt": last["attempt"],
        "step": last["step"],
        "error": last.get("error"),
        "decision": last.get("decision"),
    }


def short(status: RunStatus) -> str:
    """A run's progress in a few words, for a table; empty before there is any."""
    return describe(status) if "step" in status else ""


def report(run: str, job: Job | None, status: RunStatus | None) -> str:
    """Everything about one run, a line each."""
    lines = [f"run         {run}"]
    if job is not None:
        lines.append(f"job         {job['id']}  {job['status']}  {duration(job)}")
    if status is None:
        return "\n".join([*lines, "folder      cannot be seen from here"])
    lines.append(f"folder      {status['folder']}")
    if "step" in status:
        lines.append(f"state       {status['state']}, attempt {status['attempt']}")
        training = cast(Progress, {**status, "state": "training"})  # its state has a line of its own
        lines.append(f"progress    {describe(training)}")
    if status["start_s"]:
        lines.append(f"start       {describe_start(status['start_s'])}")
    if status["checkpoint"] is not None:
        checkpoint = status["checkpoint"]
        lines.append(f"checkpoint  {Path(checkpoint['path']).name}, {ago(checkpoint['age_s'])} ago")
    if status["failure"] is not None:
        failure = status["failure"]
        decision = f" ({failure['decision']})" if failure["decision"] else ""
        when = f"{ago(time.time() - failure['time'])} ago, attempt {failure['attempt']}, step {failure['step']}"
        lines.append(f"failure     {when}: {failure['error']}{decision}")
    return "\n".join(lines)


def error_report(events: Iterable[JobEvent]) -> list[str]:
    """The failures of a run, attempt by attempt: the cause first, then what every rank said, by time."""
    attempts: dict[int, list[JobEvent]] = {}
    for event in events:
        if is_error(event):
            attempts.setdefault(event.get("attempt", 0), []).append(event)
    lines = []
    for attempt, errors in sorted(attempts.items()):
        ranks = [event for event in errors if event["event"] == FAILED]
        own = [event for event in errors if event["event"] in FAILURES]
        # The first to fail, for a rank that lost its peer is not to blame; the job knows of the dead as well.
        first = next((event for event in ranks if not lost_peer(str(event.get("error")))), None)
        cause = own[0] if own else first or errors[0]
        rank = cause.get("failed_rank") if own else cause["rank"]
        who = "" if rank is None else f"rank {rank}: "
        lines.append(f"attempt {attempt}, cause: {who}{cause.get('error')}")
        ranks.sort(key=lambda event: (event["rank"] != rank, event["time"]))
        lines += [f"  {line(event)}" for event in (*ranks, *own)]
    return lines


def duration(job: Job) -> str:
    """How long a job has run: `1:02:03`."""
    seconds = int((job["end"] or time.time()) - job["start"]) if job["start"] else 0
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def ago(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
