"""The entry point of a Ray job: `python -m launch.train RECIPE [key=value ...]`.

The driver checks the recipe, opens the MLflow run and starts Ray Train; the training itself runs in the workers. It
imports torch only through Ray's trainer, after the recipe was found right, and never touches a GPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from echox.config.load import find_recipe, load_recipe, resolved
from echox.config.schema import Recipe
from echox.engine.cli import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP
from echox.errors import EchoXError, LaunchError
from launch import places
from launch.worker import DEFAULT_SETUP, DEFAULT_TRAIN, error_file, run_worker

if TYPE_CHECKING:
    from echox.tracking.client import MlflowTracker, RunHandle

STOPPED = 130
START_TIMEOUT_S = 600
CONTROLLER_FAILURES = 2
PASSED_ON = ("ECHOX_", "MLFLOW_", "HF_", "NCCL_", "FI_")
"""Prefixes of the environment variables that workers inherit from the driver."""


class Stopped(Exception):
    """The job was asked to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code: 0, an `EchoXError`'s own, 1 for a bug, 130 when stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train",
        description="Train one stage on the Ray cluster this job runs in.",
        epilog="Example: ray job submit --working-dir . -- python -m launch.train demo/s2t optim.steps=20",
    )
    parser.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    parser.add_argument("--debug", action="store_true", help="print tracebacks of user errors too")
    # Other parts may stand in for the engine and the stages, as the tests do.
    parser.add_argument("--train", default=DEFAULT_TRAIN, help=argparse.SUPPRESS)
    parser.add_argument("--setup", default=DEFAULT_SETUP, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    try:
        recipe = places.anchor(load_recipe(args.recipe, args.overrides), places.home())
        run(
            recipe,
            recipe_name=_label(args.recipe),
            train=args.train,
            setup=args.setup,
            accept_new_data=args.accept_new_data,
            debug=args.debug,
        )
    except Stopped:
        print("event=stopped: the job was asked to stop; submit the same recipe again to continue", flush=True)
        return STOPPED
    except EchoXError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def run(
    recipe: Recipe,
    *,
    recipe_name: str,
    train: str = DEFAULT_TRAIN,
    setup: str = DEFAULT_SETUP,
    accept_new_data: bool = False,
    debug: bool = False,
) -> None:
    """Train a recipe whose paths are absolute on the running Ray cluster; its MLflow run is ended in every case.

    Raises:
        EchoXError: a worker's error the user can act on, or `LaunchError` for everything else.
        Stopped: SIGINT or SIGTERM arrived.
    """
    from echox.tracking.run import open_run

    began = time.monotonic()
    storage = Path(recipe.storage)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    tracker = open_run(recipe, resolved(recipe), storage=storage, recipe_name=recipe_name)
    status = "FAILED"
    try:
        _say("start", recipe, attempt=tracker.handle.attempt, storage=storage, mlflow=tracker.handle.uri)
        _artifacts(recipe, tracker)
        options = {"train": train, "setup": setup, "accept_new_data": accept_new_data, "debug": debug}
        _fit(recipe, tracker.handle, options)
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise Stopped from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second signal of an impatient stop must not cut this short
        tracker.finish(status)
        _say("end", recipe, status=status, seconds=f"{time.monotonic() - began:.1f}")


def _fit(recipe: Recipe, handle: RunHandle, options: dict[str, Any]) -> None:
    """Start the workers with their options, see `run_worker`, and wait for them."""
    _connect()
    # Read by the controller, which takes them from this process. Workers stay in the job's folder, where relative
    # paths of the recipe such as ds_configs/ lead.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    import ray.train
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    on_gpu = recipe.scaling.gpus_per_worker > 0
    resources = {"CPU": recipe.scaling.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = recipe.scaling.gpus_per_worker
    _wait_for_room(recipe, resources)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"recipe": resolved(recipe), "handle": handle, **options},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=recipe.scaling.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=recipe.scaling.workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # One folder an attempt: Ray resumes a folder it knows, and what to resume is the engine's decision.
            name=f"attempt-{handle.attempt}",
            storage_path=str(handle.run_folder / "ray"),
            failure_config=FailureConfig(
                max_failures=recipe.scaling.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            # The engine reports its own life; Ray Train's lines repeat it, with a traceback a rank.
            logging_config=LoggingConfig(log_level="INFO" if options["debug"] else "CRITICAL"),
            worker_runtime_env={"env_vars": worker_environment(recipe)},
        ),
    )
    stop_seen: list[int] = []

    def on_term(signum: int, frame: object) -> None:
        stop_seen.append(signum)
        signal.raise_signal(signal.SIGINT)  # Ray Train aborts its workers on SIGINT alone

    signal.signal(signal.SIGTERM, on_term)
    try:
        trainer.fit()
    except (SystemExit, KeyboardInterrupt) as error:  # how Ray Train ends an aborted run
        raise Stopped from error
    except ray.train.TrainingFailedError as error:
        raise user_error(error, handle) from error
    except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
        if stop_seen:
            raise Stopped from error
        raise LaunchError(
            f"the Ray Train controller died: {_first_line(error)}", where=recipe.name, fix="submit the recipe again"
        ) from error


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Environment of the workers: what they need of the driver's, plus thread counts and library switches."""
    threads = str(max(1, int(recipe.scaling.cpus_per_worker)))
    passed = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    switches = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # 1, Ray's own choice, aborts before NCCL's flight recorder is written.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    if recipe.scaling.gpus_per_worker == 0:
        switches["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed calls ninja and the compiler by name; the worker's PATH is that of the Ray daemon.
    path = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(":")]))
    return {**passed, **switches, "PATH": path}


def user_error(error: BaseException, handle: RunHandle) -> EchoXError:
    """What the user is told of a failed training: a worker's own sentence where it has one, else where to look."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", {}))
    causes = {rank: _unwrapped(failure) for rank, failure in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, EchoXError):
            return cause
    for rank, cause in causes.items():
        # A rank that only lost its peer says nothing; the one that left a traceback first is the culprit.
        if error_file(handle, rank).exists():
            return LaunchError(
                f"worker {rank} failed: {type(cause).__name__}: {_first_line(cause)}",
                where=str(error_file(handle, rank)),
                fix="read the traceback in that file, then submit the recipe again: it continues from its checkpoint",
            )
    if causes:
        rank, cause = next(iter(causes.items()))
        return LaunchError(
            f"worker {rank} was lost: {type(cause).__name__}: {_first_line(cause)}",
            where=handle.run_folder.name,
            fix="check memory and the node's health, then submit the recipe again: it continues from its checkpoint",
        )
    cause = getattr(error, "controller_failure", error)
    return LaunchError(
        f"Ray Train could not run the workers: {_first_line(cause)}",
        where=handle.run_folder.name,
        fix="check `ray status`: the cluster must have the CPUs and GPUs of recipe.scaling",
    )


def _connect() -> None:
    """Join the cluster of this job, or the one at $RAY_ADDRESS; never start one."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise LaunchError(
            f"no Ray cluster runs here ({_first_line(error)})",
            fix="start one with `ray start --head`, or train in this process with `echox train RECIPE`",
        ) from error


def _wait_for_room(recipe: Recipe, resources: dict[str, float]) -> None:
    """Fail at once where the cluster could never hold the workers; Ray would wait without a word."""
    import ray

    total: dict[str, float] = ray.cluster_resources()
    short = [
        f"{name} {total.get(name, 0):g} of {need * recipe.scaling.workers:g}"
        for name, need in resources.items()
        if total.get(name, 0) < need * recipe.scaling.workers
    ]
    if short and not os.environ.get("ECHOX_AUTOSCALED"):
        raise LaunchError(
            f"the cluster is too small for {recipe.scaling.workers} workers: it has {', '.join(short)}",
            where="scaling",
            fix="lower scaling.workers or scaling.cpus_per_worker, add nodes, or wait for them with ECHOX_AUTOSCALED=1",
        )


def _artifacts(recipe: Recipe, tracker: MlflowTracker) -> None:
    """The resolved recipe, the DeepSpeed JSON and the fingerprints of the data, as files of the run."""
    import yaml

    from echox.config.paths import resolve_file
    from echox.engine.data import listings

    resolved_file = tracker.handle.run_folder / "recipe.resolved.yaml"
    resolved_file.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False))
    tracker.artifact(resolved_file, "config")
    tracker.artifact(resolve_file(recipe.engine.deepspeed), "config")
    for name, index in listings((*recipe.data.train, *recipe.data.valid)).items():
        tracker.artifact(index, f"data/{name.strip('/').replace('/', '-')}")


def _unwrapped(error: BaseException) -> BaseException:
    """The exception a worker raised, out of Ray's wrappers."""
    seen = 0
    while seen < 8:
        inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            break
        error, seen = inner, seen + 1
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _label(recipe: str) -> str:
    path = find_recipe(recipe)
    return f"{path.parent.name}/{path.stem}"


def _say(event: str, recipe: Recipe, **fields: object) -> None:
    pairs = " ".join(f"{key}={value}" for key, value in fields.items())
    print(f"event=job_{event} run={recipe.name} stage={recipe.stage} {pairs}", flush=True)


def _stop(signum: int, frame: object) -> NoReturn:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
