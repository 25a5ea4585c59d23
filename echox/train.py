"""`echox train`: trains one stage of a recipe in this process, or in every process of a torchrun."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echox.config.run_recipe import RunRecipe
    from echox.config.schema import Recipe
    from echox.engine.interfaces import TrainResult
    from echox.tracking.client import MlflowTracker

ACCEPT_NEW_DATA = "--accept-new-data"
ACCEPT_NEW_DATA_HELP = (
    "resume although datasets, plan or seed are not those of the checkpoint: a new epoch begins on the new ones"
)
ALLOW = "--allow"
ALLOW_HELP = "recipe keys that may differ from those of the checkpoint that is resumed, such as lr,steps"


def comma_list(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word for word in text.split(",") if word]


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    train = subparsers.add_parser(
        "train",
        help="train a stage in this process, or in every process of a torchrun",
        epilog="examples: echox train demo/s2t optim.steps=10\n"
        "          torchrun --standalone --nproc-per-node 2 -m echox train demo/s2t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name below launch/recipes such as demo/s2t")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to change, such as optim.steps=10"
    )
    train.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    train.add_argument(ALLOW, type=comma_list, default=[], metavar="KEY,...", help=ALLOW_HELP)
    train.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    train.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train; rank 0 tracks the run and prints the result."""
    from echox.config.load import load_recipe
    from echox.config.paths import storage_folder
    from echox.device import follow_recipe
    from echox.engine.context import LocalContext, TorchrunContext

    recipe = load_recipe(args.recipe, args.overrides)
    follow_recipe(recipe)
    storage = storage_folder(recipe.storage).resolve()
    if TorchrunContext.detected():
        with TorchrunContext(storage, timeout_s=recipe.scaling.collective_timeout_s) as world:
            result = _tracked(recipe, args, world)
            is_main = world.rank == 0
    else:
        with LocalContext(storage) as alone:
            result, is_main = _tracked(recipe, args, alone), True
    if is_main:
        _print_result(recipe, result, as_json=args.json)
    return 0


def _tracked(recipe: Recipe, args: argparse.Namespace, context: Any) -> TrainResult:
    """Train with an MLflow run that rank 0 opens and always ends."""
    from echox.builders.setup import build_setup
    from echox.engine.interfaces import NullTracker
    from echox.engine.object_store.mirror import mirrored
    from echox.engine.stop import STOP_FILE, clear_stop
    from echox.engine.trainer import train
    from echox.tracking.run import open_run

    options = {"accept_new_data": args.accept_new_data, "allow": args.allow}
    if context.rank != 0:
        with mirrored(recipe.storage, recipe.name, local_rank=context.local_rank, first=False):
            return train(recipe, context, build_setup, NullTracker(), **options)
    with mirrored(recipe.storage, recipe.name, first=True) as mirror:
        clear_stop(context.storage / recipe.name)
        if mirror is not None:
            mirror.store.remove(STOP_FILE)
        tracker = open_run(recipe, recipe.model_dump(mode="json"), storage=context.storage, recipe_name=args.recipe)
        return owned(recipe, tracker, lambda: train(recipe, context, build_setup, tracker, **options))


def owned(recipe: RunRecipe, tracker: MlflowTracker, train: Callable[[], TrainResult]) -> TrainResult:
    """Train, and end the MLflow run, of which this process is the owner, in any case."""
    from echox.tracking.system import SystemMetrics

    sampler = SystemMetrics(tracker) if recipe.tracking.system_metrics else None
    status = "FAILED"
    try:
        result = train()
        status = "KILLED" if result.stopped else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if sampler is not None:
            sampler.close()
        tracker.finish(status)
    return result


def _print_result(recipe: Recipe, result: TrainResult, *, as_json: bool) -> None:
    if as_json:
        summary = {
            "run": recipe.name,
            "folder": str(result.run_folder),
            "step": result.step,
            "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
            "already_done": result.already_done,
            "stopped": result.stopped,
            "unmoved_trainable": list(result.unmoved_trainable),
            "moved_frozen": list(result.moved_frozen),
            "metrics": dict(result.metrics),
        }
        print(json.dumps(summary))
        return
    loss = result.metrics.get("loss/total")
    said = "was already done" if result.already_done else "is done"
    if result.stopped:
        said = f"was stopped ({result.stopped}); the same command continues it"
    end = "" if loss is None else f", loss {loss:.4f}"
    print(f"run {recipe.name} {said}: step {result.step}{end}, checkpoint {result.checkpoint}", file=sys.stdout)
