"""`echox runs`: lists runs in a table, and compares runs side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.locations import without_secrets
from echox.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from echox.tracking.listing import KnownRun

PAGE = "compare.html"
LIMIT = 50
_WIDE = 240
_LONGEST = 60


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    runs = subparsers.add_parser(
        "runs",
        help="list runs, or compare them",
        epilog="example: echox runs compare 3b-s2t 8b-s2t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = runs.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "list",
        help="one line a run: status, attempts, steps, loss, scores",
        description="One line a run. A run whose process is gone before it was ended is ended on the way.",
        epilog="example: echox runs list --storage runs/demo",
    )
    show.add_argument(
        "--limit",
        type=_count,
        default=LIMIT,
        metavar="N",
        help="newest runs to show, by their last sign of life; 0 for all; default: %(default)s",
    )
    show.set_defaults(run=run_list)
    compare = actions.add_parser(
        "compare",
        help="parameters that differ, outcomes side by side, and a page with overlaid curves",
        description="Compare runs, of different scale too: parameters, outcomes, and curves on one HTML page.",
        epilog="example: echox runs compare 3b-s2t 8b-s2t --out compare.html",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run name, run folder or MLflow run id; two or more")
    compare.add_argument("--out", type=Path, default=Path(PAGE), help=f"HTML file; default: {PAGE}")
    compare.set_defaults(run=run_compare)
    for action in (show, compare):
        source = action.add_mutually_exclusive_group()
        source.add_argument(
            "--storage", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs; default: runs"
        )
        source.add_argument("--uri", help="MLflow tracking URI, for runs of which this machine sees no folder")
        action.add_argument("--json", action="store_true", help="print JSON")


def run_list(args: argparse.Namespace) -> int:
    """End what was left open, then print the table."""
    from echox.tracking.listing import of_folders, of_server, run_folders

    if args.uri:
        found, more = of_server(args.uri, args.limit or None)
        if _repaired([run.folder for run in found if run.folder is not None]):
            found, more = of_server(args.uri, args.limit or None)
        notes = ["older runs are left out; --limit 0 shows all"] if more else []
    else:
        _require(args.storage)
        folders = run_folders(args.storage)
        older = max(0, len(folders) - args.limit) if args.limit else 0
        _repaired(folders[older:])
        found, notes = of_folders(folders[older:])
        notes += [f"{older:,} older runs are left out; --limit 0 shows all"] if older else []
    _say(notes)
    rows = [run.row() for run in found]
    if args.json:
        print(json.dumps(rows))
    elif not rows:
        print(f"no runs {f'at {without_secrets(args.uri)}' if args.uri else f'in {args.storage}'}")
    else:
        _print(_table_of(rows))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Print what differs, and write the page."""
    from echox.errors import RecipeError
    from echox.tracking.compare import as_json
    from echox.tracking.curves import load
    from echox.tracking.lifecycle import make_client
    from echox.tracking.listing import LIST_TIMEOUT_S, find
    from echox.tracking.page import as_table, distinct_names, write_comparison

    if not args.uri:
        _require(args.storage, args.runs)
    found, notes = find(args.runs, args.storage, args.uri)
    _say(notes)
    unique: dict[str, KnownRun] = {run.run_id or str(run.folder): run for run in found}
    if len(unique) < 2:
        raise RecipeError("a comparison takes two different runs", fix="name another one; `echox runs list` shows them")
    names = distinct_names({key: run.name for key, run in unique.items()})
    clients = {run.uri: make_client(run.uri, LIST_TIMEOUT_S) for run in unique.values() if run.mlflow is not None}
    curves = [load(run, clients.get(run.uri), name) for run, name in zip(unique.values(), names, strict=True)]
    page = write_comparison(args.out, curves)
    if args.json:
        print(json.dumps({**as_json(curves), "page": str(page)}))
        return 0
    parameters, outcomes = as_table(curves)
    _print(_side_by_side("parameters that differ", "parameter", names, parameters))
    _print(_side_by_side("outcomes", "metric", names, outcomes))
    print(page)
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _repaired(folders: list[Path]) -> int:
    """End the runs whose owner is gone; how many."""
    from echox.tracking.run import repair

    count = 0
    for folder in folders:
        try:
            status = repair(folder)
        except Exception as error:
            _say([f"{folder.name} lost its process, but its MLflow run could not be ended: {str(error)[:160]}"])
            continue
        if status is not None:
            count += 1
            _say([f"{folder.name} lost its process; its MLflow run is ended as {status}"])
    return count


def _require(storage: Path, names: list[str] | None = None) -> None:
    from echox.errors import RecipeError

    if not storage.is_dir() and not any(Path(name).is_dir() for name in names or ()):
        raise RecipeError(f"{storage} is no folder", fix="give the folder of runs with --storage, or --uri")


def _table_of(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "scale", "stage", "status", "attempts", "step", "loss", "eval", "started", "duration", "id"):
        table.add_column(name, justify="right" if name in ("attempts", "step", "loss", "duration") else "left")
    for row in rows:
        cells = (
            row["name"],
            row["scale"] or "-",
            row["stage"] or "-",
            row["status"],
            str(row["attempts"]),
            f"{_or_dash(row['step'])}/{_or_dash(row['steps'])}",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            _scores(row["eval"]),
            "-" if row["started"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"])),
            _span(row["duration_s"]),
            row["run_id"] or "-",
        )
        table.add_row(*map(printable, cells))
    return table


def _scores(scores: dict[str, float]) -> str:
    """The accuracies and word error rates, percent, of each benchmark."""
    wanted = {"s2t_acc": "S2T", "s2s_acc": "S2S", "wer": "WER"}
    sets: dict[str, list[str]] = {}
    for name, value in sorted(scores.items()):
        benchmark, _, kind = name.rpartition("/")
        if kind in wanted:
            sets.setdefault(benchmark, []).append(f"{wanted[kind]} {100 * value:.1f}")
    return "; ".join(f"{name} {' '.join(values)}" for name, values in sets.items()) or "-"


def _side_by_side(title: str, first: str, names: list[str], rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column(first)
    for name in names:
        table.add_column(printable(name), justify="right")
    for row in rows:
        shown = map(printable, row)
        table.add_row(*(cell if len(cell) <= _LONGEST else cell[: _LONGEST - 3] + "..." for cell in shown))
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_WIDE)
    console.print(table)


def _say(notes: list[str]) -> None:
    for note in notes:
        print(printable(note), file=sys.stderr)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
