"""`echox checkpoint`: lists and verifies the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echox.errors import printable


def add_parser(subparsers: Any) -> None:
    """Register the command and its actions."""
    checkpoint = subparsers.add_parser(
        "checkpoint",
        help="list or verify the checkpoints of a run",
        epilog="example: echox checkpoint verify runs/demo/demo-s2t",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = checkpoint.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, function, text in (
        ("list", run_list, "step, time, size and weighted loss of each checkpoint"),
        ("verify", run_verify, "compare every file with the hashes in its manifest; exit code 5 if one is damaged"),
    ):
        action = actions.add_parser(
            name, help=text, description=text, epilog=f"example: echox checkpoint {name} runs/demo/demo-s2t"
        )
        action.add_argument("place", metavar="RUN", help="run folder or its URL, or one checkpoint folder")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=function)


def run_list(args: argparse.Namespace) -> int:
    """List checkpoints, newest first; damaged manifests are named, not fatal."""
    from echox.engine.checkpoint.manifest import read_manifest
    from echox.engine.object_store.reading import bring_checkpoints
    from echox.errors import CheckpointError

    folder, problems = bring_checkpoints(args.place, whole=False)
    rows: list[dict[str, Any]] = [{"checkpoint": name, "problem": problem} for name, problem in problems.items()]
    for path in _checkpoints(folder, problems):
        try:
            manifest = read_manifest(path)
            loss = manifest["metrics"].get("loss/total")
            row: dict[str, Any] = {
                "checkpoint": path.name,
                "step": manifest["step"],
                "created": manifest["created"],
                "workers": manifest["world_size"],
                "mib": round(sum(file["bytes"] for file in manifest["files"].values()) / 2**20, 1),
                "loss": None if loss is None else float(loss),
            }
        except CheckpointError as error:
            row = {"checkpoint": path.name, "problem": error.what}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            row = {"checkpoint": path.name, "problem": f"its manifest is not what a run writes: {error!r:.100}"}
        rows.append(row)
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        if "problem" in row:
            print(printable(f"{row['checkpoint']}  damaged: {row['problem']}"))
        else:
            shown = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            about = f"{row['created']}  {row['workers']} workers  {row['mib']} MiB  loss {shown}"
            print(printable(f"{row['checkpoint']}  {about}"))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify every checkpoint; the exit code tells whether all are whole."""
    from echox.engine.checkpoint.manifest import verify
    from echox.engine.object_store.reading import bring_checkpoints
    from echox.errors import CheckpointError

    folder, problems = bring_checkpoints(args.place, whole=True)
    verdicts = dict(problems)
    for path in _checkpoints(folder, problems):
        try:
            verify(path)
        except CheckpointError as error:
            verdicts[path.name] = str(error)
        else:
            verdicts[path.name] = "ok"
    if args.json:
        print(json.dumps(verdicts))
    else:
        for name, verdict in verdicts.items():
            print(printable(f"{name}  {verdict}"))
    return 0 if all(verdict == "ok" for verdict in verdicts.values()) else CheckpointError.exit_code


def _checkpoints(folder: Path, problems: Mapping[str, str]) -> list[Path]:
    from echox.engine.checkpoint.manifest import MANIFEST, list_checkpoints
    from echox.errors import CheckpointError

    found = [folder] if (folder / MANIFEST).is_file() else list_checkpoints(folder)
    if not found and not problems:
        raise CheckpointError(
            "no checkpoint found", where=str(folder), fix="give a run folder such as runs/demo/demo-s2t"
        )
    return found
