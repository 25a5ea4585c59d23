"""`echox bench`: measure the data layer."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register `echox bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed against known limits",
        epilog="example: echox bench data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    data = kinds.add_parser(
        "data",
        help="reading, decoding, indexing and opening datasets, against plain webdataset and the page cache",
        epilog="example: echox bench data --samples 1000 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument(
        "--samples", type=int, default=800, help="samples of the synthetic dataset (default: %(default)s)"
    )
    data.add_argument(
        "--catalogue", type=int, default=1_000_000, help="samples of the large catalogue (default: %(default)s)"
    )
    data.add_argument("--repeats", type=int, default=5, help="best of so many (default: %(default)s)")
    data.add_argument("--folder", type=Path, help="where its files go and are deleted again (default: a temporary one)")
    data.add_argument("--json", action="store_true", help="print JSON")
    data.set_defaults(run=run_data)


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
