"""`echox doctor`, and `echox doctor --cluster`: what is missing on this machine, or on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox import doctor
from echox.config.paths import is_url
from echox.errors import LaunchError

if TYPE_CHECKING:
    from launch.client.jobs import Jobs


def add_parser(subparsers: Any) -> None:
    """Register `echox doctor` with its options for clusters."""
    from launch.cli import add_connection

    parser = doctor.add_parser(subparsers)
    group = parser.add_argument_group("a cluster in place of this machine")
    group.add_argument("--cluster", action="store_true", help="ask every node, by a job of a few seconds")
    group.add_argument("--storage", metavar="FOLDER", help="folder or URL that all nodes have to share")
    group.add_argument(
        "--model", action="append", default=[], metavar="REF", help="model that all have to have; repeat"
    )
    add_connection(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """This machine, or the cluster."""
    if args.cluster:
        from launch.cli import connect

        return check_cluster(connect(args), args.storage, args.model, as_json=args.json)
    return doctor.run(args)


def check_cluster(jobs: Jobs, storage: str | None, models: list[str], *, as_json: bool) -> int:
    """Let a job ask the nodes, print what it says, and return 1 where something is wrong.

    Raises:
        LaunchError: the job could not be run.
    """
    from launch.client.job_environment import JobEnvironment
    from launch.client.jobs import user_name
    from launch.job.cluster_check import RESULT

    words = ["launch.job.cluster_check", *(word for model in models for word in ("--model", model))]
    words += [] if storage is None else ["--storage", storage if is_url(storage) else str(Path(storage).expanduser())]
    name = f"doctor-{time.time_ns() // 1_000_000}"
    job = jobs.submit_module(words, name, JobEnvironment(), {"user": user_name()})
    jobs.wait(job)
    lines = jobs.logs(job).splitlines()
    results = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    if not results:
        raise LaunchError(f"the job that asks the nodes failed: {jobs.failure(job)}", fix=f"see `echox logs {job}`")
    result = json.loads(results[-1])
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(line for line in lines if line.startswith(("ok  ", "FAIL"))))
        print(f"{len(result['nodes'])} nodes, {len(result['problems'])} problems")
    return 1 if result["problems"] else 0
