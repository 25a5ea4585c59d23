"""`echox voices`: compares vocoders on held-out clips."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from echox.arguments import positive
from echox.config.languages import ENGLISH


def add_parser(subparsers: Any) -> None:
    """Register `echox voices`."""
    compare = subparsers.add_parser(
        "voices",
        help="let vocoders speak held-out clips, and say which is better",
        description="Let vocoders speak the units of a dataset's recordings, with the recordings' durations and with "
        "their own. A Whisper writes down what it hears, DNSMOS rates how it sounds, the recordings beside them.",
        epilog="example: echox voices demo/tts-heldout ~/.cache/echox/data/demo/vocoder "
        "runs/demo/demo-vocoder/vocoder --out voices/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("data", help="dataset with answer.flac, answer.units and answer.durations")
    compare.add_argument("vocoders", nargs="+", metavar="VOCODER", help="vocoder folders, of the dataset's units")
    compare.add_argument("--limit", type=positive, default=60, help="most clips, at even distances; default: 60")
    compare.add_argument(
        "--rated", type=positive, default=12, metavar="N", help="clips that DNSMOS rates, where it is; default: 12"
    )
    compare.add_argument("--judge", metavar="MODEL", help="Whisper that listens; default: the demo's, a small one")
    compare.add_argument(
        "--language", default=ENGLISH, help="that is spoken, as Whisper names it; default: %(default)s"
    )
    compare.add_argument("--out", type=Path, help="folder for voices.json and voices.html, with players")
    compare.add_argument("--json", action="store_true", help="print the result as JSON")
    compare.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, save, print."""
    from echox.config.paths import resolve_data
    from echox.evaluate.columns import aligned
    from echox.evaluate.demo import JUDGE
    from echox.evaluate.judges import NamedJudge
    from echox.evaluate.quality import Dnsmos
    from echox.evaluate.spoken import take
    from echox.evaluate.voices import compare_voices, recordings, table, write_voices_page
    from echox.files import write_atomically
    from echox.speak.vocoder import check_vocoder, load_vocoder
    from echox.units.identity import UnitPart, read_unit_set
    from echox.vocoder.data import open_voice

    place = resolve_data(args.data)
    open_voice([str(place)])
    part = UnitPart(args.data, read_unit_set(place))
    for folder in args.vocoders:
        check_vocoder(folder, [part])
    spoken = recordings(take(place, args.limit))
    vocoders = {folder: load_vocoder(folder) for folder in args.vocoders}
    judge, rater = NamedJudge.find(args.judge or JUDGE), Dnsmos.find()
    found = compare_voices(
        spoken, vocoders, judge.open(args.language), rater, language=args.language, rated=args.rated, progress=_watch
    )
    result = {**found.to_json(), "judge": judge.name, "language": args.language, "data": args.data}
    if args.out is not None:
        write_voices_page(args.out / "voices.html", found)
        write_atomically(args.out / "voices.json", json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return 0
    print("\n".join([*aligned(table(found)), f"better: {found.better}"]))
    return 0


def _watch(row: str, done: int, total: int) -> None:
    print(f"{row}: {done}/{total}", file=sys.stderr)
