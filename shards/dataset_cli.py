"""`echox shards index`, `check` and `stats`: index, verify and describe datasets of shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.errors import DataError, printable
from echox.progress import Progress

if TYPE_CHECKING:
    from shards.stats import Stats


def add_actions(actions: Any) -> None:
    """Register the three below `echox shards`."""
    index = _action(
        actions,
        "index",
        "check the headers of WebDataset shards and write what training reads them by",
        "examples: echox shards index data/my-set\n"
        "          echox shards index 'https://host/set/part-{000..127}.tar' --out data/my-set",
    )
    index.add_argument("location", metavar="FOLDER|URL", nargs="+", help="folder of *.tar, or URLs of remote shards")
    index.add_argument(
        "--optional", action="append", metavar="EXT", help="member that a sample may lack; may be repeated"
    )
    index.add_argument("--out", type=Path, metavar="FOLDER", help="for a URL: where the catalogue goes")
    _workers(index)
    index.set_defaults(run=run_index)
    check = _action(
        actions,
        "check",
        "verify every byte: headers, checksums, audio, units, metadata; exit code 4 if something is wrong",
        "example: echox shards check data/my-set",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="folder of shards")
    _workers(check)
    check.set_defaults(run=run_check)
    stats = _action(
        actions,
        "stats",
        "hours, lengths, sources and duplicates of a dataset",
        "example: echox shards stats data/my-set --plot lengths.png",
    )
    stats.add_argument("location", metavar="FOLDER|URL", help="an indexed dataset")
    stats.add_argument("--plot", type=Path, metavar="FILE", help="draw histograms of the lengths (.png, .svg, .pdf)")
    stats.add_argument(
        "--tokenizer", metavar="MODEL", help="also count the tokens of this model; reads every json member"
    )
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=run_stats)


def _action(actions: Any, name: str, text: str, examples: str) -> Any:
    return actions.add_parser(
        name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _workers(action: Any) -> None:
    action.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    action.add_argument("--json", action="store_true", help="print JSON")


def run_index(args: argparse.Namespace) -> int:
    """Index every location given."""
    from echox.stream.format.indexing import index_folder
    from echox.stream.storage.remote import is_remote
    from echox.stream.storage.remote_index import index_remote

    found: list[dict[str, Any]] = []
    for location in args.location:
        show = Progress()

        def progress(done: int, total: int, samples: int, show: Progress = show, name: str = location) -> None:
            show(f"index {name}, shards", done, total)

        if is_remote(location):
            if args.out is None or len(args.location) > 1:
                raise DataError(
                    "a remote dataset is indexed alone and needs a folder for its catalogue",
                    where=location,
                    fix="add --out FOLDER; to serve it to others, upload the files there beside the shards",
                )
            listing = index_remote(location, args.out, optional=args.optional or (), progress=progress)
        else:
            listing = index_folder(Path(location), optional=args.optional, workers=args.workers, progress=progress)
        shards = listing.pop("shards")
        found.append({"location": str(args.out or location), **listing, "shards": len(shards)})
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0]))
    else:
        for row in found:
            print(f"{row['location']}: {row['samples']} samples in {row['shards']} shards, {row['hours']:.2f} hours")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print one line a defect; the result is the error's exit code if there are any."""
    from shards.check import check_folder

    samples, defects = 0, []
    for verdict in check_folder(args.folder, workers=args.workers, progress=Progress()):
        samples += verdict.samples
        for defect in verdict.defects:
            defects.append(vars(defect))
            if not args.json:
                print(printable(str(defect)), flush=True)
    if args.json:
        print(json.dumps({"samples": samples, "defects": defects}))
    else:
        print(f"{args.folder}: {samples} samples, {len(defects)} defects")
    return DataError.exit_code if defects else 0


def run_stats(args: argparse.Namespace) -> int:
    """Print the numbers; draw the histograms if asked."""
    from echox.config.paths import resolve_model
    from echox.stream.storage.store import open_catalogue
    from shards.stats import dataset_stats, plot_lengths, token_counts

    catalogue = open_catalogue(args.location)
    extra = {}
    if args.tokenizer:
        tokenizer = resolve_model(args.tokenizer, weights=False) / "tokenizer.json"
        extra = token_counts(catalogue, tokenizer, Progress())
    stats = dataset_stats(catalogue, extra)
    if args.plot:
        plot_lengths(catalogue, extra, args.plot)
        print(f"histograms: {args.plot}", file=sys.stderr)
    print(json.dumps(stats.to_json()) if args.json else stats_table(stats))
    return 0


def stats_table(stats: Stats) -> str:
    """The numbers for people."""
    lines = [
        f"{stats.location}",
        f"{stats.samples:,} samples, {stats.hours:,.2f} hours, {stats.shards:,} shards, {stats.bytes / 1e9:,.2f} GB",
        "",
        f"{'length':<18}{'samples':>10}{'total':>15}{'mean':>10}{'min':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'max':>9}",
    ]
    for name, row in stats.lengths.items():
        lines.append(
            f"{name:<18}{row.samples:>10,}{row.total:>15,.1f}{row.mean:>10,.2f}{row.min:>9,.2f}"
            f"{row.p5:>9,.2f}{row.median:>9,.2f}{row.p95:>9,.2f}{row.max:>9,.2f}"
        )
    width = max(18, *(len(name) + 2 for name in stats.sources)) if stats.sources else 18
    lines += ["", f"{'source':<{width}}{'samples':>10}{'hours':>12}{'units':>15}"]
    for name, source in sorted(stats.sources.items(), key=lambda item: -item[1]["samples"]):
        lines.append(f"{name:<{width}}{source['samples']:>10,}{source['hours']:>12,.2f}{source['units']:>15,}")
    lines.append("")
    for title, found in (("the same content", stats.same_content), ("the same text", stats.same_text)):
        examples = "; ".join(f"{second} repeats {first}" for first, second in found.examples)
        lines.append(
            f"{found.samples:,} samples with {title} as an earlier one" + (f": {examples}" if examples else "")
        )
    return "\n".join(lines)
