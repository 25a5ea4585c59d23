"""Runs the engine's train function in a Ray Train worker, with a tracker on the first rank of each node."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
from typing import Any, TypedDict

from echox.config.paths import storage_folder
from echox.engine.object_store.mirror import mirrored
from echox.errors import EchoXError
from echox.tracking.client import MlflowTracker, RunHandle
from echox.tracking.run import attach
from echox.tracking.system import SystemMetrics
from launch.job.failure_cause import error_file
from launch.job.gauges import Gauges
from launch.job.notices import watch_for_notices
from launch.job.ray_context import RayContext
from launch.recipe import JobRecipe, validated


class WorkerConfig(TypedDict):
    """What a worker is started with.

    Attributes:
        recipe: as plain values.
        handle: of the MLflow run.
        train, setup: `module:function` of the train function and of what builds its setup.
        accept_new_data, allow, debug: as on the command line.
    """

    recipe: dict[str, Any]
    handle: RunHandle
    train: str
    setup: str
    accept_new_data: bool
    allow: list[str]
    debug: bool


class WorkerResult(TypedDict):
    """How training ended: optimizer steps, newest checkpoint, and why it was stopped (empty: it was not)."""

    step: int
    checkpoint: str
    stopped: str


def run_worker(config: WorkerConfig) -> WorkerResult:
    """Train on one rank.

    Raises:
        EchoXError: what the user can act on, for the driver to print.
        Exception: anything else; its traceback is also in `<run folder>/errors/`.
    """
    recipe = validated(config["recipe"])
    context = RayContext(storage_folder(recipe.storage))
    notices = watch_for_notices(context.local_rank) or contextlib.nullcontext()
    with notices, mirrored(recipe.storage, recipe.name, first=context.rank == 0, local_rank=context.local_rank):
        return _train(config, recipe, context)


def _train(config: WorkerConfig, recipe: JobRecipe, context: RayContext) -> WorkerResult:
    from echox.engine.interfaces import NullTracker

    handle = config["handle"]
    traceback_file = error_file(handle.run_folder, context.rank)
    traceback_file.unlink(missing_ok=True)
    # DeepSpeed reads these even where the process group exists.
    os.environ.update(
        RANK=str(context.rank),
        WORLD_SIZE=str(context.world_size),
        LOCAL_RANK=str(context.local_rank),
        LOCAL_WORLD_SIZE=str(context.local_world_size),
    )
    os.environ["ECHOX_ATTEMPT"] = str(handle.attempt)
    tracker: MlflowTracker | NullTracker = NullTracker()
    if context.local_rank == 0:
        tracker = attach(handle, f"rank{context.rank}")
    sampler = None
    if isinstance(tracker, MlflowTracker) and recipe.tracking.system_metrics:
        several = context.world_size > context.local_world_size
        sampler = SystemMetrics(tracker, node=f"node-{context.node_rank}" if several else None)
    try:
        train, setup = load_object(config["train"]), load_object(config["setup"])
        heard = Gauges(tracker, run=recipe.name, stage=recipe.stage) if context.rank == 0 else NullTracker()
        result = train(
            recipe, context, setup, heard, accept_new_data=config["accept_new_data"], allow=tuple(config["allow"])
        )
        return {"step": result.step, "checkpoint": str(result.checkpoint or ""), "stopped": result.stopped}
    except EchoXError:
        if not config.get("debug"):
            # The driver prints the sentence; Ray would print the traceback of every rank before it.
            logging.getLogger("ray.train").setLevel(logging.CRITICAL + 1)
        raise
    except Exception:
        text = traceback.format_exc()
        traceback_file.parent.mkdir(parents=True, exist_ok=True)
        traceback_file.write_text(text)
        print(text, file=sys.stderr, flush=True)
        raise
    finally:
        if sampler is not None:
            sampler.close()
        tracker.finish("FINISHED")


def load_object(reference: str) -> Any:
    """The object behind `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
