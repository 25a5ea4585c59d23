"""`echox bench gpu`: measures one GPU in under nine minutes, in two halves that go on where they were."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echox.bench.gpu.results import Results

SIZE_NAMES = ("3b", "8b", "toy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command is told."""
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZE_NAMES, help="models to measure; default: 3b 8b on a GPU, toy on a CPU"
    )
    parser.add_argument("--half", type=int, choices=(1, 2), help="1: checks and the first size; 2: the rest")
    parser.add_argument("--minutes", type=float, default=9.0, help="that it may take (default: %(default)s)")
    parser.add_argument("--step-s", type=float, default=4.0, help="seconds of timed steps in a cell (default: 4)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), help="results; what is in it already is not measured again"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write it beside the results; 0 unless a check does not hold."""
    from echox.bench.gpu.results import Results
    from echox.bench.gpu.supervise import supervise

    if args.until is not None:
        return work(args)
    until = time.time() + 60 * args.minutes
    words = ["--out", str(args.out), "--minutes", str(args.minutes), "--step-s", str(args.step_s)]
    words += ["--half", str(args.half)] if args.half else []
    words += ["--device", args.device] if args.device else []
    words += ["--sizes", *args.sizes] if args.sizes else []
    command = [sys.executable, "-m", "echox", "bench", "gpu", *words, "--until", str(until)]
    supervise(command, args.out, until, say=_say)
    return finish(Results(args.out), args.json)


def finish(results: Results, as_json: bool) -> int:
    """Print what there is, write the table beside the results, and say by the exit code whether all checks hold."""
    from echox.bench.gpu.report import report

    text = report(results)
    results.path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(json.dumps({"about": results.about, "cells": results.cells}) if as_json else text.rstrip())
    broken = [name for name, cell in results.cells.items() if name.startswith("check: ") and cell["status"] == "failed"]
    return 1 if broken else 0


def work(args: argparse.Namespace) -> int:
    """The process that measures."""
    import torch

    from echox.bench.gpu.cells import Workshop, cells_of, run_cells
    from echox.bench.gpu.results import Results
    from echox.bench.gpu.supervise import BROKEN
    from echox.device import best_device

    device = torch.device(args.device or best_device())
    sizes = args.sizes or (["3b", "8b"] if device.type == "cuda" else ["toy"])
    results = Results(args.out)
    shop = Workshop(device, results, args.step_s)
    results.describe(shop.about())
    cells = [cell for cell in cells_of(sizes, device) if args.half in (None, cell.half)]
    return 0 if run_cells(cells, shop, args.until, _say) else BROKEN


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
