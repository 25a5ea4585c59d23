"""`echox shards`: build a corpus."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register `echox shards`."""
    parser = subparsers.add_parser(
        "shards",
        help="build a corpus as WebDataset shards",
        epilog="example: echox shards build demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="build a corpus below $ECHOX_CACHE/data, or finish one that was interrupted",
        epilog="example: echox shards build demo --limit 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("corpus", choices=["demo"], help="which corpus")
    build.add_argument("--limit", type=_positive, help="at most so many samples a set, to try things out")
    build.add_argument("--json", action="store_true", help="print the corpus description as JSON")
    build.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Build the corpus; progress goes to stderr, the result to stdout."""
    from echox.config.paths import cache_dir
    from shards.demo.build import build

    corpus = build(cache_dir(), lambda text: print(text, file=sys.stderr, flush=True), limit=args.limit)
    if args.json:
        print(json.dumps(corpus, indent=2, ensure_ascii=False))
    else:
        print(f"corpus {args.corpus}: {cache_dir() / 'data' / args.corpus}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
