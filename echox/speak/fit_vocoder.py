"""`python -m echox.speak.fit_vocoder`: fits the embedded vocoder on shards of one voice, in minutes on a processor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from echox.arguments import positive
from echox.errors import EchoXError, printable


def main(words: Sequence[str] | None = None) -> int:
    """Fit, and print where the vocoder is; a user's error is a sentence and its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m echox.speak.fit_vocoder",
        description="Fit the embedded vocoder (echox/speak/unit_mel.py) on answer.flac, answer.units and "
        "answer.durations of one voice. Clear enough to hear what units say; `echox vocoder train` sounds better.",
        epilog="example: python -m echox.speak.fit_vocoder data/voice vocoder/",
    )
    parser.add_argument("shards", type=Path, help="folder of shards, or a name below $ECHOX_CACHE/data")
    parser.add_argument("folder", type=Path, help="where the vocoder goes")
    parser.add_argument("--steps", type=positive, default=300, help="of its duration network (default: %(default)s)")
    args = parser.parse_args(words)
    try:
        _fit(args.shards, args.folder, args.steps)
    except EchoXError as error:
        print(printable(f"echox: {error}"), file=sys.stderr)
        return error.exit_code
    print(args.folder)
    return 0


def _fit(shards: Path, folder: Path, steps: int) -> None:
    from echox.config.paths import resolve_data
    from echox.progress import Progress
    from echox.speak.unit_mel import train_vocoder

    progress = Progress()
    train_vocoder(
        resolve_data(str(shards)),
        folder,
        steps=steps,
        progress=lambda what, done, total: progress("fit the vocoder", done, total),
    )


if __name__ == "__main__":
    sys.exit(main())
