"""`echox sweep RECIPE key=a,b,c ...`: a grid or random search as jobs of a cluster, and one page that compares them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.arguments import positive
from launch.cli import add_connection, connect

if TYPE_CHECKING:
    from launch.sweep.runner import Outcome
    from launch.sweep.stopping import MedianRule

METRIC = "valid/loss/total"
PAGE = "sweep.html"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sweep",
        help="train a recipe with many settings, as jobs, and compare them",
        description="Train a recipe with every combination of the values given, or with draws from ranges, a few jobs "
        "at a time. Run again, it goes on: what is done, running or ended early is known.",
        epilog="examples: echox sweep demo/s2t optim.lr.adapters=1e-4,3e-4,1e-3 --stop-early 100; "
        "echox sweep demo/echo 'optim.lr.llm=loguniform(1e-5,1e-3)' --samples 8",
    )
    add_connection(parser)
    parser.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    parser.add_argument("values", nargs="+", metavar="key=a,b,c", help="values to try; one value is for all trials")
    parser.add_argument("--samples", type=positive, metavar="N", help="draws from uniform(), loguniform(), choice()")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument(
        "--parallel", type=positive, default=2, metavar="N", help="jobs at a time; default: %(default)s"
    )
    parser.add_argument("--metric", default=METRIC, help="that decides; default: %(default)s")
    parser.add_argument("--maximize", action="store_true", help="more of it is better")
    parser.add_argument(
        "--stop-early", type=positive, metavar="STEPS",
        help="from that step on, end a trial that is worse than the median of three others or more at its step",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"page that compares the trials; default: {PAGE} beside the runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_sweep)


def run_sweep(args: argparse.Namespace) -> int:
    """Train, compare, print; 1 where a trial failed."""
    from echox.config.paths import storage_folder
    from launch.recipe import load_job
    from launch.sweep.runner import Sweep, problem
    from launch.sweep.stopping import MedianRule
    from launch.sweep.trials import space

    tried = space(args.values)
    base = load_job(args.recipe, tried.fixed)
    found = tried.trials(base.name, args.samples, args.seed)
    for trial in found:
        load_job(args.recipe, trial.overrides)
    rule = MedianRule(args.stop_early or 1, maximize=args.maximize)
    storage = storage_folder(base.storage)
    sweep = Sweep(
        recipe=args.recipe,
        trials=found,
        queue=connect(args),
        storage=storage,
        record=storage / f"{base.name}-sweep.json",
        metric=args.metric,
        rule=rule if args.stop_early else None,
        parallel=args.parallel,
        say=partial(print, file=sys.stderr, flush=True),
    )
    outcomes = ranked(sweep.run(), rule)
    page = _page(args.out or storage / PAGE, outcomes, storage, base.tracking.uri)
    if args.json:
        print(json.dumps({"trials": [_row(outcome, rule) for outcome in outcomes], "page": page}))
    else:
        print(table(outcomes, args.metric, rule))
        print(page or "no page: fewer than two runs can be seen from here")
    error = problem(outcomes)
    if error is not None:
        raise error
    return 0


def ranked(outcomes: Sequence[Outcome], rule: MedianRule) -> list[Outcome]:
    """The best first; those without a value last."""
    sign = -1 if rule.maximize else 1
    return sorted(outcomes, key=lambda each: (not each.curve, sign * rule.best(each.curve) if each.curve else 0.0))


def table(outcomes: Sequence[Outcome], metric: str, rule: MedianRule) -> str:
    """One line a trial, as Markdown."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.trial.values))
    lines = [f"| run | {' | '.join(keys)} | state | steps | {metric}, best | last |"]
    lines.append("|" + "---|" * (len(keys) + 5))
    for outcome in outcomes:
        row = _row(outcome, rule)
        values = " | ".join(outcome.trial.values.get(key, "") for key in keys)
        numbers = " | ".join("–" if row[name] is None else f"{row[name]:.4g}" for name in ("best", "last"))
        lines.append(f"| {outcome.trial.name} | {values} | {outcome.state} | {row['steps']} | {numbers} |")
    return "\n".join(lines)


def _row(outcome: Outcome, rule: MedianRule) -> dict[str, Any]:
    last = outcome.curve[-1] if outcome.curve else (0, None)
    return {
        "run": outcome.trial.name,
        "values": outcome.trial.values,
        "state": outcome.state,
        "why": outcome.why,
        "steps": last[0],
        "best": rule.best(outcome.curve) if outcome.curve else None,
        "last": last[1],
    }


def _page(path: Path, outcomes: Sequence[Outcome], storage: Path, uri: str | None) -> str | None:
    """The page of `echox runs compare`, of all trials that can be seen from here."""
    from echox.tracking.curves import load
    from echox.tracking.lifecycle import make_client
    from echox.tracking.listing import LIST_TIMEOUT_S, find
    from echox.tracking.page import write_comparison

    names = [outcome.trial.name for outcome in outcomes if (storage / outcome.trial.name).is_dir()]
    if len(names) < 2:
        return None
    runs, _ = find(names, storage, uri)
    clients = {run.uri: make_client(run.uri, LIST_TIMEOUT_S) for run in runs if run.mlflow is not None}
    return str(write_comparison(path, [load(run, clients.get(run.uri), run.name) for run in runs]))
