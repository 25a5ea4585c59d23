"""`echox bench`: measures the data layer, a training step, or the overhead of a run's checkpoints and checks."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echox.bench.gpu.cli import add_arguments as add_gpu_arguments


def add_parser(subparsers: Any) -> Any:
    """Register `echox bench`; returns the kinds it has, for more to be added."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed against known limits",
        epilog="examples: echox bench data\n"
        "          echox bench step demo/t2c demo/s2t\n"
        "          echox bench teacher 3b/t2c --rows 16\n"
        "          echox bench gpu --half 1",
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
        "a training step against a naive loop, and without each technique in turn, with random weights at a recipe's "
        "true shapes",
        "echox bench step demo/echo --response 64 --least-response 60",
    )
    step.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML file, or a short name such as demo/t2c")
    step.add_argument("--rows", type=int, default=12, help="samples of a micro-batch (default: %(default)s)")
    step.add_argument("--question-s", type=float, default=1.4, help="median seconds of a question")
    step.add_argument("--response", type=int, default=20, help="median tokens of a response")
    step.add_argument("--least-response", type=int, default=1, help="tokens of the shortest response")
    step.add_argument("--words", type=int, default=70, help="median words of the unit language in Stage II")
    step.add_argument("--words-per-token", type=float, default=3.0, help="words that the teacher says a text token")
    step.add_argument("--sigma", type=float, default=0.4, help="deviation of the logarithm of lengths")
    step.add_argument("--encode", action="store_true", help="run the speech encoder in the step on both sides")
    step.add_argument("--naive-only", action="store_true", help="switch no technique off")
    step.set_defaults(run=run_step)

    teacher = _kind(
        kinds,
        "teacher",
        "the greedy decode of a recipe's T2C: transformers and a cache that grows against static steps, words compared",
        "echox bench teacher 3b/t2c --rows 16",
    )
    teacher.add_argument("recipe", metavar="RECIPE", help="YAML file, or a short name such as demo/t2c")
    teacher.add_argument("--rows", type=int, default=16, help="segments (default: %(default)s)")
    teacher.add_argument("--text", type=int, default=25, help="text tokens of the longest (default: %(default)s)")
    teacher.add_argument("--words-per-token", type=float, default=3.0, help="words a text token (default: %(default)s)")
    teacher.set_defaults(run=run_teacher)

    gpu = _kind(
        kinds,
        "gpu",
        "one GPU in under nine minutes: correctness, steps of 3B and 8B, every technique switched off, the teacher; "
        "torch and transformers are enough, and on a CPU all of it runs at toy size",
        "python -m echox bench gpu --half 1 --out gpu.json",
    )
    add_gpu_arguments(gpu)

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
    """Measure each recipe's stage and print one table of each."""
    from echox.bench.micro_batch import Load
    from echox.bench.step import run, table
    from echox.bench.techniques import TECHNIQUES
    from echox.config.load import load_recipe

    load = Load(
        rows=args.rows,
        question_s=args.question_s,
        response=args.response,
        least_response=args.least_response,
        words=args.words,
        words_per_token=args.words_per_token,
        sigma=args.sigma,
    )
    recipes = [load_recipe(each) for each in args.recipes]
    if args.encode:
        encode = ["model.speech_encoder.precomputed=false"]
        recipes = [
            recipe if recipe.model.speech_encoder is None else load_recipe(name, encode)
            for name, recipe in zip(args.recipes, recipes, strict=True)
        ]
    used = () if args.naive_only else TECHNIQUES
    results = [run(recipe, load, repeats=args.repeats, techniques=used) for recipe in recipes]
    print(json.dumps([asdict(result) for result in results]) if args.json else table(results))
    return 0


def run_teacher(args: argparse.Namespace) -> int:
    """Measure a recipe's T2C decoder and print one table."""
    import torch

    from echox.bench.plan.shapes import RANDOM_WORDS, stage_shape
    from echox.bench.teacher import measure_teacher, random_teacher, random_text, table
    from echox.config.load import load_recipe
    from echox.device import best_device
    from echox.engine.precision import resolve_precision, torch_dtype
    from echox.errors import RecipeError

    recipe = load_recipe(args.recipe)
    if recipe.model.t2c is None or recipe.model.t2c.window_units is not None:
        raise RecipeError(
            f"{recipe.name} has no T2C decoder without a window", fix="name a recipe of stage t2c or echo"
        )
    torch.manual_seed(0)
    with torch.device(best_device()):
        dtype = torch_dtype(resolve_precision(recipe.engine.precision))
        decoder = random_teacher(recipe.model.t2c, stage_shape(recipe).llm.width, RANDOM_WORDS, dtype)
    text, tokens_N = random_text(decoder, args.rows, args.text)
    rows = measure_teacher(decoder, text, tokens_N, args.words_per_token, repeats=args.repeats)
    print(json.dumps([asdict(row) for row in rows]) if args.json else table(recipe.name, rows))
    return 0


def run_life(args: argparse.Namespace) -> int:
    """Measure a recipe's stage and print one table."""
    from echox.bench.life import measure_life
    from echox.bench.micro_batch import Load
    from echox.bench.table import table
    from echox.config.load import load_recipe
    from echox.device import follow_recipe

    recipe = load_recipe(args.recipe, ["scaling.workers=1"])
    follow_recipe(recipe)
    load = Load(rows=args.rows)
    rows = measure_life(recipe, load, steps=args.steps, every=args.every, repeats=args.repeats)
    print(json.dumps([asdict(row) for row in rows]) if args.json else table(rows))
    return 0
