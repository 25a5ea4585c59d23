"""`echox bench`: measures the data layer, a training step, or the overhead of a run's checkpoints and checks."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> Any:
    """Register `echox bench`; returns the kinds it has, for more to be added."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed against known limits",
        epilog="examples: echox bench data\n          echox bench step demo/t2c demo/s2t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    data = _kind(
        kinds,
        "data",
        "reading, decoding, resuming, indexing and opening datasets, against plain webdataset and the page cache",
        "echox bench data --samples 1000 --json",
    )
    data.add_argument(
        "--samples", type=int, default=800, help="samples of the synthetic dataset (default: %(default)s)"
    )
    data.add_argument(
        "--catalogue", type=int, default=1_000_000, help="samples of the large catalogue (default: %(default)s)"
    )
    data.add_argument("--folder", type=Path, help="where its files go and are deleted again (default: a temporary one)")
    data.set_defaults(run=run_data)
    step = _kind(
        kinds,
        "step",
        "forward and backward on packed rows against padded ones, with random weights at a recipe's true shapes",
        "echox bench step 3b/s2t --rows 8 --question-s 4",
    )
    step.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML file, or a short name such as demo/t2c")
    step.add_argument("--rows", type=int, default=12, help="samples of a micro-batch (default: %(default)s)")
    step.add_argument("--question-s", type=float, default=1.4, help="median seconds of a question")
    step.add_argument("--response", type=int, default=20, help="median tokens of a response")
    step.add_argument("--words", type=int, default=70, help="median words of the unit language")
    step.add_argument("--sigma", type=float, default=0.4, help="deviation of the logarithm of lengths")
    step.set_defaults(run=run_step)

    life = _kind(
        kinds,
        "life",
        "what saving and the checks of every step cost, with random weights at a recipe's true shapes",
        "echox bench life demo/t2c --every 5",
    )
    life.add_argument("recipe", metavar="RECIPE", help="YAML file, or a short name such as demo/t2c")
    life.add_argument("--steps", type=int, default=21, help="steps of each run (default: %(default)s)")
    life.add_argument("--every", type=int, default=5, help="steps between saves (default: %(default)s)")
    life.add_argument("--rows", type=int, default=12, help="samples of a micro-batch (default: %(default)s)")
    life.set_defaults(run=run_life)
    return kinds


def _kind(kinds: Any, name: str, text: str, example: str) -> Any:
    kind = kinds.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    kind.add_argument("--repeats", type=int, default=5, help="times each is measured (default: %(default)s)")
    kind.add_argument("--json", action="store_true", help="print JSON")
    return kind


def run_data(args: argparse.Namespace) -> int:
    """Measure and print one table."""
    from echox.bench.data import DataBench, measure_data
    from echox.bench.table import table
    from echox.progress import Progress

    with tempfile.TemporaryDirectory(prefix="echox-bench-", dir=args.folder) as folder:
        bench = DataBench(Path(folder), samples=args.samples, large=args.catalogue, repeats=args.repeats)
        rows = measure_data(bench, Progress())
    print(json.dumps([asdict(row) for row in rows]) if args.json else table(rows))
    return 0


def run_step(args: argparse.Namespace) -> int:
    """Measure each recipe's stage and print one table."""
    from echox.bench.step import Load, run, table
    from echox.config.load import load_recipe

    load = Load(rows=args.rows, question_s=args.question_s, response=args.response, words=args.words, sigma=args.sigma)
    results = [run(load_recipe(recipe), load, repeats=args.repeats) for recipe in args.recipes]
    print(json.dumps([asdict(result) for result in results]) if args.json else table(results))
    return 0


def run_life(args: argparse.Namespace) -> int:
    """Measure a recipe's stage and print one table."""
    from echox.bench.life import measure_life
    from echox.bench.step import Load
    from echox.bench.table import table
    from echox.config.load import load_recipe
    from echox.device import follow_recipe

    recipe = load_recipe(args.recipe, ["scaling.workers=1"])
    follow_recipe(recipe)
    load = Load(rows=args.rows)
    rows = measure_life(recipe, load, steps=args.steps, every=args.every, repeats=args.repeats)
    print(json.dumps([asdict(row) for row in rows]) if args.json else table(rows))
    return 0
