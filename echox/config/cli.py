"""`echox recipe`: the keys that a recipe can have."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    recipe = subparsers.add_parser(
        "recipe",
        help="what a recipe can say",
        epilog="example: echox recipe keys",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = recipe.add_subparsers(dest="action", metavar="ACTION", required=True)
    keys = actions.add_parser(
        "keys",
        help="print the reference of all keys",
        description="Print every key of a recipe with type, default, meaning and what a resume does where it changed, "
        "as Markdown.",
        epilog="example: echox recipe keys",
    )
    keys.add_argument("--write", action="store_true", help="write it to echox/config/README.md instead")
    keys.set_defaults(run=run_keys)


def run_keys(args: argparse.Namespace) -> int:
    """`echox recipe keys`."""
    from echox.config.reference import README, reference

    if args.write:
        README.write_text(reference(), encoding="utf-8")
        print(f"wrote {README}")
    else:
        sys.stdout.write(reference())
    return 0
