"""Options of `echox submit` for other schedulers, and what becomes of them: printed, or handed to kubectl or sbatch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from echox.config.paths import is_url
from echox.errors import LaunchError

COMMANDS = {"kuberay": ("kubectl", "create", "-f", "-"), "slurm": ("sbatch",)}
"""What takes a manifest or script on its standard input."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where a run goes that does not go to a running Ray cluster."""
    group = parser.add_argument_group("in place of a running Ray cluster")
    group.add_argument("--cluster", choices=["ray", *COMMANDS], default="ray", help="default: ray, a running cluster")
    group.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    group.add_argument("--workers-per-node", type=int, metavar="N", help="ranks of a node; default: 8, without GPUs 1")
    group.add_argument(
        "--claim", default="echox", help="kuberay: PersistentVolumeClaim mounted at /shared; '' where storage is a URL"
    )
    group.add_argument("--standing", action="store_true", help="kuberay: a RayCluster that stays, without the run")
    group.add_argument(
        "--secret", action="append", default=[], help="kuberay: Secret of variables for all pods; repeat"
    )
    group.add_argument("--namespace", default="", help="kuberay: namespace")
    group.add_argument("--memory", default="", help="kuberay: memory of a worker pod, such as 800Gi")
    group.add_argument("--time", default="24:00:00", help="slurm: time limit (default: %(default)s)")
    group.add_argument("--partition", default="", help="slurm: partition")
    group.add_argument("--account", default="", help="slurm: account")
    group.add_argument("--setup", default="", metavar="LINE", help="slurm: shell line that puts the project on PATH")


def submit(args: argparse.Namespace, recipe: Any, words: Sequence[str]) -> str:
    """Hand a run to the scheduler that the options name; returns what it says, or with --dry-run what it would get.

    Args:
        args: of `echox submit`.
        recipe: loaded.
        words: arguments of `launch.train`.

    Raises:
        LaunchError: the scheduler is not here, or refuses.
    """
    text = described(args, recipe, words)
    if args.dry_run:
        return text
    command = COMMANDS[args.cluster]
    try:
        done = subprocess.run(command, input=text, text=True, capture_output=True)
    except OSError as error:
        raise LaunchError(
            f"{command[0]} cannot be run here: {error.strerror}",
            fix=f"print it with --dry-run, and hand it to {command[0]} where there is one",
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"{command[0]} refuses the run: {said[-1]}")
    sys.stderr.write(done.stderr)
    return done.stdout


def described(args: argparse.Namespace, recipe: Any, words: Sequence[str]) -> str:
    """The manifest or script of a run."""
    from launch.deploy.kuberay import PodOptions, as_yaml, ray_cluster, ray_job
    from launch.deploy.plan import plan_of
    from launch.deploy.slurm import SlurmOptions, batch_script

    plan = plan_of(recipe, words, args.workers_per_node)
    if args.cluster == "slurm":
        asked = SlurmOptions(time=args.time, partition=args.partition, account=args.account, setup=args.setup)
        return batch_script(plan, asked)
    if not args.image:
        raise LaunchError("a RayJob needs --image, with the project in it", fix="build launch/deploy/Dockerfile")
    if not args.claim and not is_url(recipe.storage):
        raise LaunchError(
            f"without a claim the pods do not share storage={recipe.storage}", fix="name a claim, or s3://bucket/runs"
        )
    pods = PodOptions(
        image=args.image,
        claim=args.claim,
        secrets=tuple(args.secret),
        namespace=args.namespace,
        memory=args.memory,
    )
    return as_yaml(ray_cluster(plan, pods) if args.standing else ray_job(plan, pods, retries=args.retries))
