"""Follows a job: a progress bar fed by the run folder's progress file, and the job's own error when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from echox.errors import LaunchError
from echox.run_records import Progress as ProgressRecord
from launch.client.jobs import Jobs
from launch.events import read_progress

PLAIN_EVERY_S = 10.0


class _Columns(ProgressColumn):
    """Loss, rate and time to go, each only once known."""

    def render(self, task: Task) -> Text:
        """One line of numbers."""
        return Text(describe(cast(ProgressRecord, task.fields.get("record") or {}), with_step=False))


def describe(record: ProgressRecord, *, with_step: bool = True) -> str:
    """A progress record as words: `12/300 loss 2.31 25.0 samples/s ETA 1:05`."""
    words = [f"{record['step']}/{record['steps']}"] if with_step and "step" in record else []
    if record.get("loss") is not None:
        words.append(f"loss {record['loss']:.3f}")
    if record.get("samples_per_s"):
        words.append(f"{record['samples_per_s']:.1f} samples/s")
    eta_s = record.get("eta_s")
    if eta_s is not None and record.get("state") == "training":
        minutes, seconds = divmod(int(eta_s), 60)
        words.append(f"ETA {minutes}:{seconds:02d}")
    state = record.get("state")
    if state and state != "training":
        words.append(str(state))
    return "  ".join(words)


def follow(
    jobs: Jobs,
    job: str,
    run_folder: Path,
    *,
    title: str,
    console: Console,
    watch: Callable[[ProgressRecord], None] | None = None,
    poll_s: float = 0.5,
) -> None:
    """Show a job's progress until it ends: a live bar on a terminal, a line every ten seconds elsewhere.

    Args:
        jobs: the cluster's job API.
        job: submission id.
        run_folder: of its run.
        title: in front of every line.
        console: where to.
        watch: called with the progress record at every look.
        poll_s: seconds between looks.

    Raises:
        LaunchError: the job failed or was stopped; the sentence is the job's own.
    """
    since = time.time()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Columns())
    live = Progress(*columns, console=console, disable=not console.is_terminal, transient=False)
    shown, said_at = "", time.monotonic()
    with live:
        task: TaskID = live.add_task(f"{title}: starting workers", total=None)

        def look() -> None:
            nonlocal shown, said_at
            record = read_progress(run_folder)
            if record.get("time", 0) < since:
                return
            step, steps = record["step"], record["steps"]
            live.update(task, description=f"{title} {step}/{steps}", completed=step, total=steps, record=record)
            if watch is not None:
                watch(record)
            text = describe(record)
            if not console.is_terminal and text != shown and time.monotonic() - said_at > PLAIN_EVERY_S:
                console.print(f"  {title}  {text}", highlight=False)
                shown, said_at = text, time.monotonic()

        status = jobs.wait(job, poll_s=poll_s, on_poll=look)
        look()
    if status != "SUCCEEDED":
        raise LaunchError(
            f"job {job} {'was stopped' if status == 'STOPPED' else 'failed'}: {jobs.failure(job)}",
            fix=f"the whole log: echox logs {job}" if status == "FAILED" else "run the same command again to continue",
        )
    final = describe(read_progress(run_folder))
    console.print(f"  {title}  {final}", highlight=False)
