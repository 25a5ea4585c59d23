"""`echox submit`, `status`, `logs` and `stop`: a recipe on a Ray cluster, through Ray's job API."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any

from echox.engine.cli import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP

if TYPE_CHECKING:
    from launch.submit import Jobs

ADDRESS_HELP = "address of the cluster's dashboard; default: $RAY_ADDRESS, then a head on this machine"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the four commands."""
    submit = _command(subparsers, "submit", "train a recipe on a Ray cluster", "echox submit demo/s2t optim.steps=20")
    submit.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    submit.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    submit.add_argument("-f", "--follow", action="store_true", help="print the log until the job ends")
    submit.set_defaults(run=run_submit)
    status = _command(subparsers, "status", "list jobs, or one run's", "echox status demo-s2t")
    status.add_argument("job", nargs="?", help="submission id or run name; default: all")
    status.set_defaults(run=run_status)
    logs = _command(subparsers, "logs", "print a job's log", "echox logs demo-s2t -f")
    logs.add_argument("job", help="submission id, or a run name for its newest job")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    logs.set_defaults(run=run_logs)
    stop = _command(subparsers, "stop", "stop a job and wait until it has", "echox stop demo-s2t")
    stop.add_argument("job", help="submission id, or a run name for its newest job")
    stop.set_defaults(run=run_stop)


def run_submit(args: argparse.Namespace) -> int:
    """Submit; with --follow, the exit code is 0 only if the job succeeds."""
    jobs = connect(args.address)
    extra = [ACCEPT_NEW_DATA] if args.accept_new_data else []
    job = jobs.submit(args.recipe, args.overrides, extra_arguments=extra)
    if not args.follow:
        _print(args, {"id": job, "address": jobs.address}, f"submitted {job}; follow it: echox logs {job} -f")
        return 0
    return _follow(jobs, job)


def run_status(args: argparse.Namespace) -> int:
    """Print one line a job, oldest first."""
    jobs = connect(args.address)
    found = jobs.list()
    if args.job is not None:
        jobs.find(args.job)  # a clear sentence where there is no such job
        found = [job for job in found if args.job in (job["id"], job["run"])]
    lines = [f"{job['id']:32} {job['status']:10} {_duration(job):>9}  {_first(job['message'])}" for job in found]
    _print(args, found, "\n".join(lines) or f"no jobs at {jobs.address}")
    return 0


def run_logs(args: argparse.Namespace) -> int:
    """Print the log; with --follow, until the job ends, and 0 only if it succeeds."""
    jobs = connect(args.address)
    job = jobs.find(args.job)
    if args.follow:
        return _follow(jobs, job)
    print(jobs.logs(job), end="")
    return 0


def run_stop(args: argparse.Namespace) -> int:
    """Stop the job politely; Ray kills it only when it does not end in time."""
    jobs = connect(args.address)
    job = jobs.find(args.job)
    status = jobs.stop(job)
    _print(args, {"id": job, "status": status}, f"{job} {status}")
    return 0


def connect(address: str | None) -> Jobs:
    """The job API at an address, at $RAY_ADDRESS, or of a head this project left running here."""
    from launch.cluster import remembered
    from launch.submit import Jobs

    if address is None and not os.environ.get("RAY_ADDRESS"):
        head = remembered()
        if head is not None:
            os.environ.update(head.environment())
    return Jobs(address)


def _command(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
    )
    parser.add_argument("--address", metavar="http://HOST:PORT", help=ADDRESS_HELP)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _follow(jobs: Jobs, job: str) -> int:
    for piece in jobs.follow(job):
        print(piece, end="", flush=True)
    return 0 if jobs.wait(job) == "SUCCEEDED" else 1


def _print(args: argparse.Namespace, result: Any, text: str) -> None:
    print(json.dumps(result, indent=1) if args.json else text)


def _duration(job: dict[str, Any]) -> str:
    seconds = int((job["end"] or time.time()) - job["start"]) if job["start"] else 0
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _first(message: str) -> str:
    return message.strip().splitlines()[0][:100] if message.strip() else ""
