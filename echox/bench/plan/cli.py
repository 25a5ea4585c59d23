"""`echox plan`: predicts whether a recipe fits on GPUs, how long its steps take, and what bounds them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echox.bench.plan.forecast import Forecast
    from echox.config.schema import Recipe

HEADER = "predicted; not measured on a GPU"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    from echox.bench.plan.load import Sample
    from echox.engine.hardware import GPUS

    usual = Sample()
    text = "predict memory, step time and traffic of a recipe on GPUs, from shapes alone"
    plan = subparsers.add_parser(
        "plan",
        help=text,
        description=f"{text}.",
        epilog="example: echox plan 8b/echo --gpus 8 --hardware h100 --hours 500",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name below launch/recipes such as 3b/echo")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    plan.add_argument("--gpus", type=_gpus, default=8, help="GPUs, 1 to 1024 (default: %(default)s)")
    plan.add_argument("--hardware", choices=list(GPUS), default="h100", help="kind of GPU (default: %(default)s)")
    plan.add_argument("--network", type=float, default=50.0, help="GB/s between nodes for each GPU (default: 50)")
    plan.add_argument("--hours", type=float, help="hours of audio of a pass; default: those of data.train, if present")
    plan.add_argument(
        "--question-s", type=float, default=usual.question_s, help="seconds of a question (default: %(default)s)"
    )
    plan.add_argument("--reply", type=int, default=usual.reply, help="tokens of a reply (default: %(default)s)")
    plan.add_argument(
        "--words-per-token",
        type=float,
        default=usual.words_per_token,
        help="unit-language words a text token (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict and print; 0 also where nothing fits, for then it says so."""
    from echox.bench.plan.forecast import forecast
    from echox.bench.plan.load import Sample
    from echox.config.load import load_recipe
    from echox.engine.hardware import GPUS

    recipe = load_recipe(args.recipe, args.overrides)
    sample = Sample(question_s=args.question_s, reply=args.reply, words_per_token=args.words_per_token)
    found = forecast(recipe, GPUS[args.hardware], args.hardware, args.gpus, sample=sample, network_gb_s=args.network)
    hours = catalogue_hours(recipe) if args.hours is None else args.hours
    if args.json:
        corpus = {"audio_hours": hours, "pass_hours": None if hours is None else found.corpus_hours(hours)}
        print(json.dumps({**found.as_json(), **corpus}))
    else:
        print(text(found, sample_text(args), hours))
    return 0


def catalogue_hours(recipe: Recipe) -> float | None:
    """Hours of the questions in data.train, where every source is there."""
    from echox.config.paths import resolve_data
    from echox.errors import EchoXError
    from echox.stream.format.catalogue import Catalogue

    try:
        catalogues = [(Catalogue.open(resolve_data(source.path)), source.repeat) for source in recipe.data.train]
    except (EchoXError, OSError):
        return None
    seconds = sum(float(catalogue.records["question_s"].sum()) * repeat for catalogue, repeat in catalogues)
    return seconds / 3600 or None


def sample_text(args: argparse.Namespace) -> str:
    """The assumption about samples, as a clause."""
    words = f"{args.words_per_token:g} unit words a token"
    return f"samples of {args.question_s:g} s, {args.reply} tokens and {words}, all alike"


def text(found: Forecast, sample: str, hours: float | None) -> str:
    """The forecast as Markdown."""
    gib, total = 2.0**30, sum(found.memory.values())
    lines = [
        f"# {found.recipe} on {found.gpus} x {found.hardware}: {HEADER}",
        "",
        f"{found.micro_batch} samples at once, {found.micro_batches} times a step, {found.global_batch} in all; "
        f"{sample}. "
        f"{found.frozen / 1e9:.2f} G frozen and {found.trainable / 1e6:.1f} M trainable weights.",
        "",
        "| memory of a GPU | GiB |",
        "|---|---:|",
        *(f"| {name} | {size / gib:.2f} |" for name, size in found.memory.items() if size >= 0.005 * gib),
        f"| **all**, of {found.limit / gib:.1f} that can be filled | **{total / gib:.1f}** |",
        "",
        "| time of a step | TFLOP | ms | bound by |",
        "|---|---:|---:|---|",
        *(
            f"| {name} | {part.flops / 1e12:.2f} | {part.seconds * 1e3:.1f} | {part.bound} |"
            for name, part in found.parts.items()
        ),
        f"| **all**, MFU {found.mfu:.0%} | **{found.flops / 1e12:.1f}** | **{found.step_s * 1e3:.0f}** "
        f"| mostly {found.bound} |",
        "",
        f"A rank receives {sum(found.link.values()) / 1e9:.2f} GB a step: {found.link['weights'] / 1e9:.2f} of "
        "weights, "
        f"{found.link['gradients'] / 1e9:.2f} of gradients.",
        f"{found.steps:,} steps take {found.steps * found.step_s / 3600:.1f} h"
        + (f", a pass over {hours:,.0f} h of audio {found.corpus_hours(hours):.2f} h." if hours else "."),
        f"The largest micro-batch that fits: {found.largest} samples." if found.largest else "No micro-batch fits.",
        *found.advice,
    ]
    return "\n".join(lines)


def _gpus(word: str) -> int:
    number = int(word)
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError("1 to 1024")
    return number
