"""`echox ablate SCALE`: train and score the arms of an ablation, and print one table with intervals."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.arguments import positive

if TYPE_CHECKING:
    from launch.ablation.arms import Arm
    from launch.ablation.runs import Ablation
    from launch.ablation.scoring import Examiner, Scores
    from launch.ablation.table import Row

SCALES = ("demo", "small")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "ablate",
        help="train and score variants of Stage III, and compare them",
        description="Train variants of Stage III on this machine, score them on the held-out questions of the scale's "
        "corpus, and print one table with intervals. Run again, it goes on: what is done is reused.",
        epilog="example: echox ablate demo --arms reference,no-denoising --seeds 3",
    )
    parser.add_argument("scale", metavar="SCALE", choices=SCALES, help=" or ".join(SCALES))
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe keys to change; s2t.KEY, t2c.KEY, echo.KEY in one stage",
    )
    parser.add_argument("--arms", type=_names, default=[], metavar="A,B", help="arms beside the base; default: all")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each arm; default: 1")
    parser.add_argument("--limit", type=positive, metavar="N", help="most items of each held-out set")
    parser.add_argument(
        "--storage", type=Path, metavar="FOLDER", help="folder of the scale's runs; default: runs/SCALE"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=ablate)


def ablate(args: argparse.Namespace) -> int:
    """Train, score, compare, log, print."""
    from echox.config.load import load_recipe
    from echox.config.paths import cache_dir
    from echox.progress import Progress
    from launch.ablation.arms import chosen
    from launch.ablation.runs import Ablation
    from launch.ablation.scoring import Examiner

    arms = chosen(args.scale, args.arms)
    storage = (args.storage or Path(load_recipe(f"{args.scale}/echo").storage)).expanduser().absolute()
    examiner = Examiner(args.scale, args.limit, Progress())
    ablation = Ablation(
        scale=args.scale,
        storage=storage,
        corpus=cache_dir() / "data" / args.scale,
        overrides=tuple(args.overrides),
        say=_say,
    )
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result, text = run(ablation, examiner, arms, args.seeds)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(result) if args.json else text, end="\n" if args.json else "")
    return 0


def run(ablation: Ablation, examiner: Examiner, arms: tuple[Arm, ...], seeds: int) -> tuple[dict[str, Any], str]:
    """Do all that is left to do; returns what `ablation.json` and `ablation.md` hold.

    The first seed of every arm comes before the second of any, so that what an interruption leaves is a comparison.
    """
    from launch.ablation.table import compare, markdown
    from launch.ablation.tracked import log, score_metrics

    ablation.check(arms)
    scores: dict[str, dict[int, Scores]] = {}
    folders: list[Path] = []
    for seed in ablation.seeds(seeds):
        for arm in arms:
            if arm.trained:
                folder = ablation.run(arm, seed)
                found = scores.setdefault(arm.name, {})[seed] = examiner.scores(folder)
                _warn(ablation, log(folder, "run_id", score_metrics(found), []))
                folders.append(folder)
    rows = compare(arms, scores)
    result = {
        "scale": ablation.scale,
        "limit": examiner.limit,
        "arms": [asdict(arm) for arm in arms],
        "rows": [asdict(row) for row in rows],
    }
    text = markdown(ablation.scale, arms, rows)
    _keep(ablation, folders[-1], rows, result, text)
    return result, text


def _keep(ablation: Ablation, run: Path, rows: list[Row], result: dict[str, Any], text: str) -> None:
    """Write both files, and log them to the parent run of `run`."""
    from echox.files import write_atomically
    from launch.ablation.tracked import log, table_metrics

    table, listing = ablation.folder / "ablation.md", ablation.folder / "ablation.json"
    write_atomically(table, text)
    write_atomically(listing, json.dumps(result, indent=1) + "\n")
    _warn(ablation, log(run, "parent_id", table_metrics(rows), [table, listing]))


def _warn(ablation: Ablation, trouble: str) -> None:
    if trouble:
        ablation.say(f"warning: {trouble}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
