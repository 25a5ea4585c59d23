"""Follows a job from outside its cluster: across the loss of the cluster, and to another submission where it failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from echox.errors import LaunchError, TrainingError

if TYPE_CHECKING:
    from launch.client.jobs import Jobs

LOST = "LOST"
"""State of a job that its cluster no longer knows."""
FINAL_CODES = frozenset({*range(2, LaunchError.exit_code), TrainingError.exit_code})
"""Exit codes of the user's own mistakes, which another submission repeats."""


def submit_and_follow(
    connect: Callable[[], Jobs],
    submit: Callable[[Jobs], str],
    *,
    retries: int,
    write: Callable[[str], None],
    wait_s: float = 2.0,
) -> str:
    """Submit a run and follow it to its end, through at most so many further submissions.

    Args:
        connect: a new connection to the cluster; LaunchError while there is none.
        submit: submits the run, returns the job.
        retries: submissions after the first.
        write: takes the log, and a line on what goes on here.
        wait_s: seconds between looks for a cluster that is away.

    Returns:
        The last job's state: SUCCEEDED, FAILED, STOPPED or `LOST`.
    """
    jobs = connect()
    while True:
        job = submit(jobs)
        jobs, state = follow_to_end(connect, jobs, job, write=write, wait_s=wait_s)
        code = next((entry["exit_code"] for entry in jobs.list() if entry["id"] == job), None)
        if state in ("SUCCEEDED", "STOPPED") or code in FINAL_CODES or retries == 0:
            return state
        retries -= 1
        write(f"job {job} is {state}; submitting the run again, {retries} retries left\n")


def follow_to_end(
    connect: Callable[[], Jobs], jobs: Jobs, job: str, *, write: Callable[[str], None], wait_s: float = 2.0
) -> tuple[Jobs, str]:
    """Write a job's log until it ends, waiting for the cluster where it goes away; returns connection and state."""
    written = 0
    while True:
        try:
            skip = written
            for piece in jobs.follow(job):
                # After a lost connection the log comes from its beginning again.
                fresh = piece[skip:]
                skip = max(0, skip - len(piece))
                written += len(fresh)
                if fresh:
                    write(fresh)
            return jobs, jobs.wait(job)
        except LaunchError as error:
            write(f"{error.what}; waiting\n")
        jobs = wait_for_cluster(connect, wait_s)
        known = {entry["id"]: entry["status"] for entry in jobs.list()}
        if job not in known:
            return jobs, LOST


def wait_for_cluster(connect: Callable[[], Jobs], wait_s: float) -> Jobs:
    """A connection, as soon as there is one and it answers."""
    while True:
        try:
            jobs = connect()
            jobs.list()
            return jobs
        except LaunchError:
            time.sleep(wait_s)
