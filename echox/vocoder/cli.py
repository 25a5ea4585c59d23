"""`echox vocoder`: imports a published unit HiFi-GAN, or trains one on shards."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.train import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP, ALLOW, ALLOW_HELP, comma_list

if TYPE_CHECKING:
    from echox.engine.interfaces import TrainResult
    from echox.vocoder.recipe import VoiceRecipe


def add_parser(subparsers: Any) -> None:
    """Register `echox vocoder`."""
    vocoder = subparsers.add_parser(
        "vocoder",
        help="import or train a unit HiFi-GAN",
        epilog="example: echox vocoder import g_00500000 config.json voice/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = vocoder.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_import(actions)
    _add_train(actions)


def _add_import(actions: Any) -> None:
    imported = actions.add_parser(
        "import",
        help="convert a code HiFi-GAN of fairseq to a vocoder folder",
        description="Convert a code HiFi-GAN that fairseq trained to a folder that `--vocoder` takes. The checkpoint "
        "is read as plain tensors, and nothing in it is executed.",
        epilog="example: echox vocoder import g_00500000 config.json voice/ --units units/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    imported.add_argument("checkpoint", type=Path, help="its g_* file")
    imported.add_argument("config", type=Path, help="its config.json")
    imported.add_argument("folder", type=Path, help="where the vocoder goes")
    imported.add_argument(
        "--units",
        type=Path,
        metavar="FOLDER",
        help="folder that records which units it speaks, such as that of a k-means",
    )
    imported.add_argument("--speaker", type=int, metavar="N", help="one voice alone, from 0, of a model of several")
    imported.add_argument("--json", action="store_true", help="print the result as JSON")
    imported.set_defaults(run=run_import)


def _add_train(actions: Any) -> None:
    train = actions.add_parser(
        "train",
        help="train a unit HiFi-GAN on shards, in this process or in every process of a torchrun",
        description="Train a unit HiFi-GAN with its duration predictor on answer.flac, answer.units and "
        "answer.durations of one voice, or of several (generator.speaker). The vocoder is kept in the run's folder "
        "under vocoder/.",
        epilog="examples: echox vocoder train demo optim.steps=100\n"
        "          torchrun --standalone --nproc-per-node 8 -m echox vocoder train hifi_gan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("voice", metavar="RECIPE", help="YAML file, or a name below launch/vocoders such as demo")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to change, such as optim.steps=100"
    )
    train.add_argument("--out", type=Path, metavar="FOLDER", help="put the vocoder here too")
    train.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    train.add_argument(ALLOW, type=comma_list, default=[], metavar="KEY,...", help=ALLOW_HELP)
    train.add_argument("--json", action="store_true", help="print the result as JSON")
    train.set_defaults(run=run_train)


def run_import(args: argparse.Namespace) -> int:
    """`echox vocoder import`."""
    from echox.errors import DataError
    from echox.units.identity import RECORD, read_unit_set
    from echox.vocoder.fairseq import convert
    from echox.vocoder.shape import write_vocoder

    unit_set = read_unit_set(args.units) if args.units is not None else None
    if args.units is not None and unit_set is None:
        fix = f"name a folder with {RECORD}, or leave --units out: the units are then not compared with others"
        raise DataError("the folder does not record which units it holds", where=str(args.units), fix=fix)
    shape, weights = convert(args.checkpoint, args.config, args.speaker)
    if unit_set is not None and unit_set.clusters != shape.units:
        raise DataError(
            f"the vocoder speaks {shape.units} units, and {args.units} has {unit_set}",
            where=str(args.checkpoint),
            fix="name the units that it was trained on",
        )
    write_vocoder(args.folder, shape, weights, unit_set)
    result = {
        "folder": str(args.folder),
        "units": shape.units,
        "sample_rate": shape.sample_rate,
        **({"speakers": shape.speakers} if shape.speaker else {}),
        "weights": sum(tensor.numel() for tensor in weights.values()),
        "unit_set": unit_set.digest if unit_set is not None else None,
    }
    said = ", ".join(f"{key} {value}" for key, value in result.items() if value is not None)
    print(json.dumps(result) if args.json else said)
    return 0


def run_train(args: argparse.Namespace) -> int:
    """`echox vocoder train`; rank 0 tracks the run and prints the result."""
    from echox.config.paths import storage_folder
    from echox.device import follow_recipe
    from echox.engine.context import LocalContext, TorchrunContext
    from echox.vocoder.recipe import load_voice

    recipe = load_voice(args.voice, args.overrides)
    follow_recipe(recipe)
    storage, timeout_s = storage_folder(recipe.storage).resolve(), recipe.scaling.collective_timeout_s
    under_torchrun = TorchrunContext.detected()
    with TorchrunContext(storage, timeout_s=timeout_s) if under_torchrun else LocalContext(storage) as context:
        result, is_main = _tracked(recipe, args, context), context.rank == 0
    if is_main:
        _print_result(recipe, result, args)
    return 0


def _tracked(recipe: VoiceRecipe, args: argparse.Namespace, context: Any) -> TrainResult:
    """Train with an MLflow run that rank 0 opens and always ends."""
    from echox.engine.stop import clear_stop
    from echox.tracking.run import open_run
    from echox.train import owned
    from echox.vocoder.trainer import train_voice

    options = {"accept_new_data": args.accept_new_data, "allow": args.allow}
    if context.rank != 0:
        return train_voice(recipe, context, **options)
    clear_stop(context.storage / recipe.name)
    tracker = open_run(recipe, recipe.model_dump(mode="json"), storage=context.storage, recipe_name=args.voice)
    return owned(recipe, tracker, lambda: train_voice(recipe, context, tracker, **options))


def _print_result(recipe: VoiceRecipe, result: TrainResult, args: argparse.Namespace) -> None:
    from echox.vocoder.trainer import VOCODER

    vocoder = result.run_folder / VOCODER
    if args.out is not None:
        shutil.copytree(vocoder, args.out, dirs_exist_ok=True)
        vocoder = args.out
    summary = {
        "run": recipe.name,
        "folder": str(result.run_folder),
        "vocoder": str(vocoder),
        "step": result.step,
        "already_done": result.already_done,
        "stopped": result.stopped,
        "metrics": dict(result.metrics),
    }
    said = "was already done" if result.already_done else "is done"
    if result.stopped:
        said = f"was stopped ({result.stopped}); the same command continues it"
    print(json.dumps(summary) if args.json else f"run {recipe.name} {said}: step {result.step}, vocoder {vocoder}")
