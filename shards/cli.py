"""`echox shards`: builds a corpus, and encodes, indexes, checks and describes shards."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from echox.arguments import positive
from shards.build_cli import add_builders
from shards.dataset_cli import add_actions


def add_parser(subparsers: Any) -> None:
    """Register `echox shards`."""
    parser = subparsers.add_parser(
        "shards",
        help="build, index, check and describe datasets of WebDataset shards",
        epilog="examples: echox shards build demo\n          echox shards check data/my-set",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="build a corpus as shards, or finish one that was interrupted",
        epilog="example: echox shards build manifest --source recordings.jsonl --out data/recordings",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    corpora = build.add_subparsers(dest="corpus", metavar="CORPUS", required=True)
    demo = corpora.add_parser(
        "demo",
        help="the demo's corpus, made below $ECHOX_CACHE/data out of nothing but a text model and a voice",
        epilog="example: echox shards build demo --limit 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--limit", type=positive, help="at most so many samples a set, to try things out")
    demo.add_argument("--scale", choices=("demo", "small"), default="demo", help="small: hours of the answer voice")
    demo.add_argument("--json", action="store_true", help="print the corpus description as JSON")
    demo.set_defaults(run=run_build)
    add_builders(corpora)
    encode = actions.add_parser(
        "encode",
        help="write the frozen speech encoder's output into the shards a recipe reads",
        epilog="example: echox shards encode demo/s2t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encode.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    encode.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    encode.set_defaults(run=run_encode)
    add_actions(actions)


def run_build(args: argparse.Namespace) -> int:
    """Build the demo's corpus and all that its recipes read; progress goes to stderr, the result to stdout."""
    from echox.config.load import load_recipe
    from echox.config.paths import cache_dir
    from shards.builder.encode import encode_sources
    from shards.demo.build import build
    from shards.demo.voice import ensure_vocoder

    corpus = build(cache_dir(), _say, limit=args.limit, scale=args.scale)
    encode_sources(load_recipe(f"{args.scale}/s2t"), _say)
    ensure_vocoder(cache_dir(), scale=args.scale)
    if args.json:
        print(json.dumps(corpus, indent=2, ensure_ascii=False))
    else:
        print(f"corpus {args.scale}: {cache_dir() / 'data' / args.scale}")
    return 0


def run_encode(args: argparse.Namespace) -> int:
    """Encode every folder the recipe trains or validates on."""
    from echox.config.load import load_recipe
    from echox.errors import RecipeError
    from shards.builder.encode import encode_sources

    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.stage == "t2c":
        raise RecipeError("stage t2c hears no speech", where=args.recipe, fix="name an s2t or echo recipe")
    encode_sources(recipe, _say)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
