"""`echox vocoder`: imports a published unit HiFi-GAN."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register `echox vocoder import`."""
    vocoder = subparsers.add_parser(
        "vocoder",
        help="import a unit HiFi-GAN",
        epilog="example: echox vocoder import g_00500000 config.json voice/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = vocoder.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_import(actions)


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
    imported.add_argument("--speaker", type=int, metavar="N", help="which voice, from 0, of a model of several")
    imported.add_argument("--json", action="store_true", help="print the result as JSON")
    imported.set_defaults(run=run_import)


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
        "weights": sum(tensor.numel() for tensor in weights.values()),
        "unit_set": unit_set.digest if unit_set is not None else None,
    }
    said = ", ".join(f"{key} {value}" for key, value in result.items() if value is not None)
    print(json.dumps(result) if args.json else said)
    return 0
