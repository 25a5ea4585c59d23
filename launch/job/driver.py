"""Drives a job as a child of `launch.train`: opens the MLflow run, lets Ray Train run the workers, and waits.

Everything of Ray happens in a thread, for Ray takes signals for itself in the main one: Ray Train's handler kills the
workers, and a stop should let them save first. It imports no torch and never touches a GPU.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from echox.config.load import find_recipe, resolved
from echox.config.paths import run_dir
from echox.device import cpu_is_wanted
from echox.engine.object_store.mirror import Mirror, mirrored
from echox.engine.object_store.run_store import RunStore
from echox.engine.stop import STOP_FILE, clear_stop, read_stop, request_stop
from echox.errors import EchoXError, LaunchError
from launch import paths
from launch.events import FAILED, MORE_ROOM, JobLog, read_events, read_progress
from launch.job.command_line import ABORTED, AGAIN, CRASHED, arguments, said
from launch.job.environment import node_defaults, worker_environment
from launch.job.failure_cause import find_cause, first_line
from launch.job.ray_context import DRAINED
from launch.job.signals import StopSignals, die_with
from launch.job.worker import WorkerConfig, WorkerResult, run_worker
from launch.recipe import JobRecipe, config_files, datasets, load_job, train_function, worker_counts

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

    from echox.tracking.client import MlflowTracker, RunHandle

START_TIMEOUT_S = 60
"""Room for the workers that does not come within this is asked for again: the run says that it waits, and a range of
workers tries fewer."""
AUTOSCALED_START_TIMEOUT_S = 600
"""Where nodes are added on demand, a demand that comes and goes would start and end machines."""
RAY_STOP_WAIT_S = 3.0
"""What Ray gives a job to end, unless RAY_JOB_STOP_WAIT_TIME_S says otherwise."""
OWN_STOP_WAIT_S = 120.0
POLL_S = 0.1


class Aborted(Exception):
    """The driver ends without the workers' consent: they had nothing to save, or no time is left."""

    def __init__(self, why: str, *, orderly: bool) -> None:
        super().__init__(why)
        self.orderly = orderly


def main(argv: Sequence[str] | None = None) -> int:
    """Run the driver; its exit codes are those of the job, and `AGAIN` and `CRASHED`."""
    args = arguments("python -m launch.job.driver").parse_intermixed_args(argv)
    if args.parent:
        die_with(args.parent)
    signals = StopSignals()
    signals.listen()
    try:
        recipe = paths.make_absolute(load_job(args.recipe, args.overrides), paths.home())
        return Driver(recipe, args, signals).run()
    except EchoXError as error:
        return said(error, debug=args.debug)
    except Exception:
        traceback.print_exc()
        return CRASHED


class Driver:
    """One life of the driver.

    Args:
        recipe: paths absolute.
        args: of `launch.job.command_line.arguments`.
        signals: listening.
    """

    def __init__(self, recipe: JobRecipe, args: Any, signals: StopSignals) -> None:
        self.recipe = recipe
        self.args = args
        self.signals = signals
        self.run_folder = run_dir(recipe.storage, recipe.name)
        self.log = JobLog(self.run_folder)
        self.began = time.monotonic()
        self._attempt_before = 0

    def run(self) -> int:
        """Train; the MLflow run is ended in every case.

        Raises:
            EchoXError: a worker's error the user can act on, or `LaunchError` for everything else.
        """
        with mirrored(self.recipe.storage, self.recipe.name, first=False, follows=True) as mirror:
            self._attempt_before = read_progress(self.run_folder).get("attempt", 0)
            self._withdraw_old_requests(mirror)
            return self._run()

    def _run(self) -> int:
        from echox.tracking.run import open_run

        label = _label(self.args.recipe)
        try:
            tracker = open_run(self.recipe, resolved(self.recipe), storage=self.run_folder.parent, recipe_name=label)
        except EchoXError as error:
            self.log("failed", error=str(error))
            raise
        status, code = "FAILED", 0
        try:
            self.log("start", restart=self.args.restart, mlflow=tracker.handle.uri, pid=os.getpid())
            self._artifacts(tracker)
            result = self._wait_for_work(_Work(lambda: self._fit(tracker.handle)))
            stopped = str(result["stopped"])
            if stopped:
                status = "KILLED"
                tracker.set_tags({"stopped": stopped})
                self.log("stopped", why=stopped, step=result["step"], checkpoint=result["checkpoint"])
                code = AGAIN if self._restarts(stopped) else 0
            else:
                status = "FINISHED"
        except Aborted as error:
            status = "KILLED"
            tracker.set_tags({"stopped": str(error)})
            self.log("aborted", why=str(error))
            code = 0 if error.orderly else ABORTED
        except EchoXError as error:
            self.log("failed", error=str(error))
            raise
        finally:
            tracker.finish(status)
            self.log("end", status=status, seconds=f"{time.monotonic() - self.began:.1f}")
        if code == ABORTED or (status == "KILLED" and code == 0):
            print("event=stopped: submit the same recipe again to continue", flush=True)
        return code

    def _wait_for_work(self, work: _Work) -> WorkerResult:
        """Wait for the training; on a signal, ask it to stop and wait as long as Ray will."""
        deadline: float | None = None
        while not work.done.wait(POLL_S):
            # When it connects, Ray's core puts a handler of its own in place, which ends the process after 3 s.
            self.signals.listen()
            if self.signals.abort_requested:
                raise Aborted(f"{self.signals.why}, twice", orderly=False)
            if deadline is None and self.signals.asked:
                if not self._under_way():
                    raise Aborted(f"{self.signals.why} before the first step: there was nothing to save", orderly=True)
                deadline = time.monotonic() + grace_s()
                request_stop(self.run_folder, self.signals.why)
                self.log("stopping", why=self.signals.why, grace_s=grace_s())
            if deadline is not None and time.monotonic() > deadline:
                raise Aborted(f"{self.signals.why}, and the run had not stopped in {grace_s():g} s", orderly=False)
        return work.outcome()

    def _under_way(self) -> bool:
        """Whether workers of this driver have come to their first step; the clocks of their nodes may differ."""
        progress = read_progress(self.run_folder)
        begun = progress.get("attempt", 0) > self._attempt_before
        return begun and progress.get("state") not in ("starting", None)

    def _withdraw_old_requests(self, mirror: Mirror | None) -> None:
        """A request to stop is not meant for a new job; a driver started again leaves all but its own."""
        why = read_stop(self.run_folder)
        if not self.args.restart or (why is not None and why.startswith(MORE_ROOM)):
            clear_stop(self.run_folder)
            if mirror is not None:
                mirror.store.remove(STOP_FILE)

    def _restarts(self, stopped: str) -> bool:
        """Whether the run stopped for its nodes' sake alone."""
        if self.signals.asked or not stopped.startswith((DRAINED, MORE_ROOM)):
            return False
        request = read_stop(self.run_folder)
        return request is None or request.startswith(MORE_ROOM)

    def _fit(self, handle: RunHandle) -> WorkerResult:
        """Start the workers with their options, see `run_worker`, and wait for them."""
        recipe, scaling = self.recipe, self.recipe.scaling
        least, most = scaling.bounds
        connect()
        # Read by the controller, which takes them from this process. Workers stay in the job's folder, where relative
        # paths of the recipe such as ds_configs/ lead.
        grows = bool(os.environ.get("ECHOX_AUTOSCALED")) and least == most
        start_timeout_s = AUTOSCALED_START_TIMEOUT_S if grows else START_TIMEOUT_S
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_timeout_s))
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        import ray.train

        if len(ray.nodes()) == 1 and not os.environ.get("ECHOX_AUTOSCALED"):
            # When the only node is drained, no process is left to notify: one process less to start.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

        from launch.job.policies import Failures, FixedCount, LegalCounts, Trainer
        from launch.job.queue import ClusterBoard, Queue
        from launch.job.torch_backend import TorchGroup

        on_gpu = scaling.gpus_per_worker > 0
        resources = {"CPU": scaling.cpus_per_worker}
        if on_gpu:
            resources["GPU"] = scaling.gpus_per_worker
        if not self.args.restart:
            check_room(recipe, resources)
        failure_config = FailureConfig(max_failures=scaling.max_failures)
        scaling_config = ScalingConfig(num_workers=scaling.workers, use_gpu=on_gpu, resources_per_worker=resources)
        queue = Queue(self.run_folder, scaling.priority, scaling.queue_timeout_s, ClusterBoard())
        counts: ScalingPolicy | None = None
        if least != most:
            counts = LegalCounts(scaling_config, counts=worker_counts(recipe), run_folder=self.run_folder, queue=queue)
        elif not os.environ.get("ECHOX_AUTOSCALED"):
            counts = FixedCount(scaling_config, queue=queue)
        options: WorkerConfig = {
            "recipe": resolved(recipe),
            "handle": handle,
            "train": self.args.train or train_function(recipe),
            "setup": self.args.setup,
            "accept_new_data": self.args.accept_new_data,
            "allow": self.args.allow,
            "debug": self.args.debug,
        }
        trainer = Trainer(
            run_worker,
            train_loop_config=options,
            backend_config=TorchGroup(
                backend="nccl" if on_gpu and not cpu_is_wanted() else "gloo",
                timeout_s=scaling.collective_timeout_s,
                defaults=node_defaults(),
            ),
            scaling_config=scaling_config,
            run_config=RunConfig(
                # One folder an attempt: Ray resumes a folder it knows, and what to resume is the engine's decision.
                name=f"attempt-{handle.attempt}",
                **ray_storage(recipe),
                failure_config=failure_config,
                # The engine reports its own life; Ray Train's lines repeat it, with a traceback a rank.
                logging_config=LoggingConfig(log_level="INFO" if self.args.debug else "CRITICAL"),
                worker_runtime_env={"env_vars": worker_environment(recipe)},
            ),
            failures=Failures(
                failure_config,
                max_failures=scaling.max_failures,
                max_start_failures=scaling.max_start_failures,
                run_folder=self.run_folder,
                wanted={name: need * least for name, need in resources.items()},
                queue_timeout_s=scaling.queue_timeout_s,
            ),
            counts=counts,
        )
        try:
            result: Any = trainer.fit()
        except ray.train.TrainingFailedError as error:
            attempt = read_progress(self.run_folder).get("attempt")
            events = [e for e in read_events(self.run_folder) if e["event"] == FAILED and e.get("attempt") == attempt]
            raise find_cause(error, self.run_folder, events).error from error
        return cast(WorkerResult, result.return_value)

    def _artifacts(self, tracker: MlflowTracker) -> None:
        """The resolved recipe, the files that it names and the fingerprints of the data, as files of the run."""
        import yaml

        from echox.builders.data import listings

        recipe = self.recipe
        resolved_file = self.run_folder / paths.RESOLVED
        resolved_file.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False))
        for file in (resolved_file, *config_files(recipe)):
            tracker.artifact(file, "config")
        for name, index in listings(datasets(recipe)).items():
            tracker.artifact(index, f"data/{name.strip('/').replace('/', '-')}")


class _Work:
    """A function in a thread that the process does not wait for when it ends."""

    def __init__(self, function: Callable[[], WorkerResult]) -> None:
        self.done = threading.Event()
        self._function = function
        self._result: WorkerResult | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="fit", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def outcome(self) -> WorkerResult:
        """What the function returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def grace_s() -> float:
    """Seconds the workers have to stop: what Ray gives the job, less a quarter (15 s at most) to end the MLflow run."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    wait = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or (RAY_STOP_WAIT_S if in_job else OWN_STOP_WAIT_S))
    return wait - min(15.0, wait / 4)


def ray_storage(recipe: JobRecipe) -> dict[str, Any]:
    """Where Ray Train keeps its own small files: beside the run, in whatever that lies in."""
    store = RunStore.of(recipe.storage, recipe.name)
    if store is None:
        return {"storage_path": str(run_dir(recipe.storage, recipe.name) / "ray")}
    import pyarrow.fs

    filesystem, root = store.filesystem()
    return {
        "storage_path": f"{root}/ray",
        "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
    }


def connect() -> None:
    """Join the cluster of this job, or the one at $RAY_ADDRESS; never start one."""
    # It would warn that it cannot take SIGTERM for itself here, which is the point.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    except ValueError as error:
        place = os.environ.get("RAY_ADDRESS", "")
        fix = f"give --address {place}, so that a job of the cluster does it, or unset RAY_ADDRESS on a node of it"
        raise LaunchError(f"RAY_ADDRESS={place} is where jobs are submitted, not a cluster to join", fix=fix) from error
    except ConnectionError as error:
        raise LaunchError(
            f"no Ray cluster runs here ({first_line(error)})",
            fix="start one with `ray start --head`, or train in this process with `echox train RECIPE`",
        ) from error


def check_room(recipe: JobRecipe, resources: dict[str, float]) -> None:
    """Fail at once where the cluster could never hold the workers; Ray would wait without a message."""
    import ray

    least, _ = recipe.scaling.bounds
    total: dict[str, float] = ray.cluster_resources()
    short = [
        f"{name} {total.get(name, 0):g} of {need * least:g}"
        for name, need in resources.items()
        if total.get(name, 0) < need * least
    ]
    if short and not os.environ.get("ECHOX_AUTOSCALED"):
        raise LaunchError(
            f"the cluster is too small for {least} workers: it has {', '.join(short)}",
            where="scaling",
            fix="lower scaling.workers or scaling.cpus_per_worker, add nodes, or wait for them with ECHOX_AUTOSCALED=1",
        )


def _label(recipe: str) -> str:
    path = find_recipe(recipe)
    return f"{path.parent.name}/{path.stem}"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ray's thread may still wait for workers that die with this process.
    os._exit(code)
