"""Defines the options of every command that speaks: which vocoder, and who of its speakers."""

from __future__ import annotations

import argparse
from pathlib import Path

SPEAKER_HELP = "who speaks, in a vocoder of several: a name in its config.json, or a number from 0; default: the first"


def add_voice_options(parser: argparse.ArgumentParser) -> None:
    """Add `--vocoder` and `--speaker`, as `load_vocoder` takes them."""
    parser.add_argument(
        "--vocoder", type=Path, help="vocoder folder; default: the demo's, below $ECHOX_CACHE/data/demo"
    )
    parser.add_argument("--speaker", metavar="NAME", help=SPEAKER_HELP)
