"""`echox evaluate` and `echox report`: score a run on held-out sets, and write the page that shows the scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a run on the demo's held-out sets",
        description="Ask held-out questions by voice, let the run answer aloud, let an independent ASR model judge.",
        epilog="example: echox evaluate runs/demo/demo-echo --limit 10",
    )
    parser.add_argument("trained", metavar="RUN", help="run, URL of a run, or checkpoint folder of the echo stage")
    parser.add_argument("--limit", type=int, help="most items of each set")
    parser.add_argument("--vocoder", type=Path, help="vocoder folder; default: the demo's")
    parser.add_argument("--corpus", default="demo", help="folder of the sets below $ECHOX_CACHE/data; default: demo")
    parser.add_argument(
        "--out", type=Path, help="folder for scores and samples; default: evaluation/ in the run's parent"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.set_defaults(run=evaluate)
    page = subparsers.add_parser(
        "report",
        help="write report.html from an evaluation",
        description="Curves of the stages, scores and players in one HTML file that needs nothing beside it.",
        epilog="example: echox report runs/demo",
    )
    page.add_argument("storage", type=Path, help="folder of runs with evaluation/ in it")
    page.add_argument("--out", type=Path, help="HTML file; default: report.html in the folder")
    page.set_defaults(run=report)


def evaluate(args: argparse.Namespace) -> int:
    """Score, save, print."""
    from echox.engine.object_store.reading import local_run
    from echox.evaluate.demo import evaluate_demo
    from echox.evaluate.store import save_evaluation

    def watch(name: str, done: int, total: int) -> None:
        print(f"{name} {done}/{total}", file=sys.stderr)

    run = local_run(args.trained)
    found = evaluate_demo(run, vocoder=args.vocoder, limit=args.limit, progress=watch, corpus=args.corpus)
    scores = found.to_json()
    save_evaluation(args.out or run.parent / "evaluation", scores, found.samples())
    if args.json:
        print(json.dumps(scores))
        return 0
    for line in score_lines(scores):
        print(line)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the page."""
    from echox.errors import DataError
    from echox.evaluate.report import STAGES, write_report
    from echox.evaluate.store import check_scores, load_evaluation, read_metrics
    from echox.files import read_record

    scores, samples = load_evaluation(args.storage / "evaluation")
    try:
        result = check_scores({**read_record(args.storage, "result.json"), **scores})
    except (TypeError, AttributeError) as error:
        where = str(args.storage / "result.json")
        raise DataError(f"this is no result: {error}", where=where, fix="remove it") from error
    runs = {stage: sorted(args.storage.glob(f"*-{stage}")) for stage in STAGES}
    curves = {stage: read_metrics(folders[-1]) for stage, folders in runs.items() if folders}
    print(write_report(args.out or args.storage / "report.html", result, curves, samples))
    return 0


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """The scores as a table, a line a score with what it means."""
    from echox.evaluate.columns import COLUMNS, cell, note, percent
    from echox.evaluate.report import streaming_rows

    sets = scores["sets"]
    table = [["", *sets], ["", *(note(row) for row in sets.values())]]
    table += [[column.label, *(cell(column.key, row) for row in sets.values())] for column in COLUMNS]
    widths = [max(len(row[place]) for row in table) for place in range(len(sets) + 1)]
    meanings = ["", "", *(column.meaning for column in COLUMNS)]
    lines = [
        "  ".join([*(f"{word:{width}}" for word, width in zip(row, widths, strict=True)), meaning]).rstrip()
        for row, meaning in zip(table, meanings, strict=True)
    ]
    taught, exact = (percent(scores[f"t2c_heldout_{name}"]) for name in ("wer", "exact"))
    again, original = (percent(scores[name]) for name in ("resynthesis_wer", "original_wer"))
    lines.append(
        f"held-out sentences: the teacher's WER {taught} ({exact} heard word for word), true units spoken again "
        f"{again}, original audio {original}"
    )
    streamed = ", ".join(f"{label} {value}" for label, value in streaming_rows(scores.get("streaming", {})))
    return [*lines, f"streamed: {streamed}"] if streamed else lines
