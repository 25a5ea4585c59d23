"""`echox submit`, `resume`, `status`, `logs` and `stop`: run a recipe on a Ray cluster, through Ray's job API."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import is_url
from echox.errors import LaunchError, printable
from echox.train import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP, ALLOW, ALLOW_HELP, comma_list
from launch.deploy.options import add_options

if TYPE_CHECKING:
    from launch.client.job_environment import JobEnvironment
    from launch.client.jobs import Job, Jobs

ADDRESS_HELP = "address of the cluster's dashboard; default: $RAY_ADDRESS, then a head on this machine"
RESPOND, RESPOND_SUFFIX = "echox.respond:respond_in_job", "-respond"
LIMIT = 50
"""Jobs that `echox status` lists."""
RUN_HELP = "run name, submission id, or the run's folder"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the five commands."""
    submit = _command(subparsers, "submit", "train a recipe on a Ray cluster", "echox submit demo/s2t optim.steps=20")
    submit.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    submit.add_argument(
        "--respond",
        action="store_true",
        help="answer the questions of a Stage III recipe (`echox respond`), not train it",
    )
    submit.set_defaults(run=run_submit)
    resume = _command(subparsers, "resume", "go on with a run that has ended", "echox resume demo-s2t optim.steps=900")
    resume.add_argument("job", metavar="RUN", help=RUN_HELP)
    resume.set_defaults(run=run_resume)
    for command in (submit, resume):
        _add_environment(command)
        add_options(command)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
        command.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
        command.add_argument(ALLOW, type=comma_list, default=[], metavar="KEY,...", help=ALLOW_HELP)
        command.add_argument("-f", "--follow", action="store_true", help="print the log until the job ends")
        command.add_argument(
            "--retries", type=int, default=0, metavar="N", help="follow, and submit again where job or cluster failed"
        )
    status = _command(subparsers, "status", "list jobs, or all that is known of a run", "echox status demo-s2t")
    status.add_argument("job", nargs="?", metavar="RUN", help=f"{RUN_HELP}; default: all jobs")
    status.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help="newest jobs to list; 0 for all; default: %(default)s"
    )
    status.set_defaults(run=run_status)
    logs = _command(subparsers, "logs", "print a job's log, or a run's events", "echox logs demo-s2t -f")
    logs.add_argument("job", metavar="RUN", help=f"{RUN_HELP}; a folder gives the events of all ranks by time")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    logs.add_argument("--errors", action="store_true", help="what failed, the cause first")
    logs.set_defaults(run=run_logs)
    stop = _command(subparsers, "stop", "let a run save and end, and wait for it", "echox stop demo-s2t")
    stop.add_argument("job", metavar="RUN", help=RUN_HELP)
    stop.add_argument("--force", action="store_true", help="also a run that another user has submitted")
    stop.set_defaults(run=run_stop)


def run_submit(args: argparse.Namespace) -> int:
    """Submit; with --follow, the exit code is 0 only if the job succeeds."""
    return _submit(args, args.recipe)


def run_resume(args: argparse.Namespace) -> int:
    """Submit the recipe that a run's folder holds, with changes."""
    from launch.client.status import resolved_recipe

    _, found = _jobs_if_any(args)
    return _submit(args, str(resolved_recipe(args.job, found)))


def run_status(args: argparse.Namespace) -> int:
    """Print one line a job, oldest first, or everything about one run."""
    from launch.client.status import locate, report, run_status, short

    jobs, found = _jobs_if_any(args)
    if args.job is None:
        older = max(0, len(found) - args.limit) if args.limit else 0
        shown = found[older:]
        folders = [locate(job["id"], [job]) for job in shown]
        states = [None if folder is None else run_status(folder) for folder in folders]
        rows = [{**job, "progress": state} for job, state in zip(shown, states, strict=True)]
        lines = [_row(job, "" if state is None else short(state)) for job, state in zip(shown, states, strict=True)]
        if older:
            print(f"{older:,} older jobs are left out; --limit 0 shows all", file=sys.stderr)
        _print(args, rows, "\n".join(lines) or "no jobs")
        return 0
    folder = locate(args.job, found)
    run = args.job if folder is None else folder.name
    mine = [job for job in found if args.job in (job["id"], job["run"]) or run == job["run"]]
    if folder is None and not mine:
        newest = ", ".join(job["id"] for job in found[-5:])
        raise LaunchError(f"no job or run named {args.job}", fix=f"the newest jobs are: {newest or 'none'}")
    last = mine[-1] if mine else None
    status = None if folder is None else run_status(folder, None if last is None else last["start"])
    earlier = [_row(entry, "") for entry in mine[:-1]]
    _print(args, {"run": run, "job": last, "status": status}, "\n".join([report(run, last, status), *earlier]))
    return 0


def run_logs(args: argparse.Namespace) -> int:
    """Print the log; with --follow, until the job ends, and 0 only if it succeeds."""
    from launch.client.status import error_report, locate
    from launch.events import follow_events, line, read_events, read_progress

    by_folder = os.sep in args.job or Path(args.job).is_dir()
    jobs, found = _jobs_if_any(args) if by_folder or args.errors else (connect(args), [])
    folder = locate(args.job, found) if by_folder or args.errors else None
    if args.errors:
        if folder is None and jobs is not None:
            print(jobs.failure(jobs.find(args.job)))
        elif folder is not None:
            lines = error_report(read_events(folder))
            _print(args, lines, "\n".join(lines) or f"no failures in {folder}")
        return 0
    if by_folder:
        if folder is None:
            raise LaunchError(f"{args.job} is no run folder", fix="see `echox status`")

        def going_on() -> bool:
            if is_url(args.job):
                locate(args.job)
            return args.follow and read_progress(folder).get("state") not in ("finished", "failed", "stopped")

        for event in follow_events(folder, going_on):
            print(json.dumps(event) if args.json else printable(line(event)), flush=True)
        return 0
    assert jobs is not None
    job = jobs.find(args.job)
    if args.follow:
        return _follow(args, jobs, job)
    print(jobs.logs(job), end="")
    return 0


def run_stop(args: argparse.Namespace) -> int:
    """Stop the job politely; Ray kills it only when it does not end in time."""
    from echox.engine.object_store.run_store import RunStore
    from echox.engine.stop import STOP_FILE, request, request_stop

    if is_url(args.job):
        RunStore(args.job).write(STOP_FILE, request("echox stop").encode())
        _print(args, {"folder": args.job}, f"the run in {args.job} will save and end")
        return 0
    if Path(args.job).is_dir():
        try:
            request_stop(Path(args.job), "echox stop")
        except OSError as error:
            raise LaunchError(
                f"{STOP_FILE} cannot be written there: {error.strerror or error}",
                where=args.job,
                fix="look at who owns the folder and what is in it, or stop the job by its name",
            ) from error
        _print(args, {"folder": args.job}, f"the run in {args.job} will save and end")
        return 0
    jobs = connect(args)
    job = jobs.find(args.job)
    status = jobs.stop(job, force=args.force)
    _print(args, {"id": job, "status": status}, f"{job} {status}")
    return 0


def connect(args: argparse.Namespace) -> Jobs:
    """The job API at --address, at $RAY_ADDRESS, or of a head this project left running here."""
    from launch.client.job_environment import parse_table
    from launch.client.jobs import Jobs
    from launch.client.local_head import remembered

    if args.address is None and not os.environ.get("RAY_ADDRESS"):
        head = remembered()
        if head is not None:
            os.environ.update(head.environment())
    headers = parse_table(args.headers, "--headers") if args.headers else None
    return Jobs(args.address, headers=headers, authority=args.verify)


def _command(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
    )
    add_connection(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_connection(parser: Any) -> None:
    """Options that say which cluster is meant and how it is reached, see `connect`."""
    parser.add_argument("--address", metavar="http://HOST:PORT", help=ADDRESS_HELP)
    parser.add_argument("--headers", metavar="JSON", help="headers of every request; default: $RAY_JOB_HEADERS")
    parser.add_argument("--verify", type=Path, metavar="FILE", help="certificates that the server's is checked against")


def _add_environment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the job is given; the options of `ray job submit`")
    group.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable; repeat")
    group.add_argument("--runtime-env", type=Path, metavar="FILE", help="Ray's runtime environment: YAML or JSON")
    group.add_argument("--image", default="", metavar="URI", help="container image that holds the project")
    for name, kind, what in (("cpus", float, "CPUs"), ("gpus", float, "GPUs")):
        group.add_argument(f"--entrypoint-num-{name}", type=kind, metavar="N", help=f"{what} of the entry process")
    group.add_argument("--entrypoint-memory", type=int, metavar="BYTES", help="memory of the entry process")
    group.add_argument("--entrypoint-resources", metavar="JSON", help="other resources of the entry process")


def _environment(args: argparse.Namespace) -> JobEnvironment:
    from launch.client.job_environment import (
        EntryResources,
        JobEnvironment,
        parse_table,
        parse_variables,
        read_runtime_env,
    )

    return JobEnvironment(
        variables=parse_variables(args.env),
        described={} if args.runtime_env is None else read_runtime_env(args.runtime_env),
        image=args.image,
        resources=EntryResources(
            cpus=args.entrypoint_num_cpus,
            gpus=args.entrypoint_num_gpus,
            memory=args.entrypoint_memory,
            named=parse_table(args.entrypoint_resources, "--entrypoint-resources"),
        ),
    )


def _submit(args: argparse.Namespace, recipe: str) -> int:
    from launch.client.resubmit import submit_and_follow
    from launch.recipe import load_job

    extra = [ACCEPT_NEW_DATA] if args.accept_new_data else []
    extra += [ALLOW, ",".join(args.allow)] if args.allow else []
    overrides = args.overrides
    if getattr(args, "respond", False):
        # A run of its own: its folder and its MLflow run are not those of the training.
        overrides = [*overrides, f"name={load_job(recipe, overrides).name}{RESPOND_SUFFIX}"]
        extra += ["--train", RESPOND]

    if args.cluster != "ray" or args.dry_run:
        _print(args, *_elsewhere(args, recipe, overrides, extra))
        return 0
    environment = _environment(args)

    def submit(jobs: Jobs) -> str:
        return jobs.submit(recipe, overrides, environment=environment, extra_arguments=extra)

    if args.follow or args.retries:
        state = submit_and_follow(partial(connect, args), submit, retries=args.retries, write=_write)
        return 0 if state == "SUCCEEDED" else 1
    jobs = connect(args)
    job = submit(jobs)
    _print(args, {"id": job, "address": jobs.address}, f"submitted {job}; follow it: echox logs {job} -f")
    return 0


def _elsewhere(
    args: argparse.Namespace, recipe: str, overrides: Sequence[str], extra: Sequence[str]
) -> tuple[Any, str]:
    """What a scheduler says of a run that it was given, or what it would get."""
    from launch.deploy.options import submit
    from launch.recipe import load_job

    if args.cluster == "ray":
        raise LaunchError("--dry-run prints what a scheduler would get", fix="name it: --cluster kuberay or slurm")
    said = submit(args, load_job(recipe, overrides), [recipe, *overrides, *extra])
    return {"cluster": args.cluster, "said": said}, said.rstrip("\n")


def _follow(args: argparse.Namespace, jobs: Jobs, job: str) -> int:
    from launch.client.resubmit import follow_to_end

    _, state = follow_to_end(partial(connect, args), jobs, job, write=_write)
    return 0 if state == "SUCCEEDED" else 1


def _jobs_if_any(args: argparse.Namespace) -> tuple[Jobs | None, list[Job]]:
    """The cluster and its jobs; none where a run's folder may say enough without it."""
    try:
        jobs = connect(args)
        return jobs, jobs.list()
    except LaunchError:
        from launch.client.status import locate

        if args.job is None or locate(args.job) is None:
            raise
        return None, []


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _row(job: Job, progress: str) -> str:
    from launch.client.status import duration

    words = progress or _first(job["message"])
    return f"{job['id']:32} {job['status']:10} {duration(job):>9}  {words}"


def _print(args: argparse.Namespace, result: Any, text: str) -> None:
    print(json.dumps(result, indent=1) if args.json else printable(text))


def _first(message: str) -> str:
    return message.strip().splitlines()[0][:100] if message.strip() else ""
