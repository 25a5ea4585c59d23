"""`echox export` and `echox import`: models out of runs, and published models into folders that runs start from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FORMATS = ("hf", "merged", "peft", "echox")


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    export = subparsers.add_parser(
        "export",
        help="write a trained run as a folder that others load",
        description="Write a run of Stage I or III as a folder that others load.\n\n"
        "hf      the LLM with its LoRA merged, the speech parts, recipe and model card; echox takes it as a run\n"
        "merged  the LLM with its LoRA merged, with its tokenizer: an ordinary Hugging Face folder\n"
        "peft    the LoRA alone, as stock PEFT loads it beside the base model\n"
        "echox   the format of the released EchoX weights; refuses what they cannot express",
        epilog="example: echox export runs/demo/demo-echo demo-echo-hf --format hf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("trained", metavar="RUN", help="run folder or its URL, one checkpoint, or an exported folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be new")
    export.add_argument("--format", dest="form", choices=FORMATS, default="hf", help="default: hf")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of a merged LLM; default: the one the run computed in",
    )
    export.add_argument("--with-encoder", action="store_true", help="hf: copy the speech encoder into the folder")
    export.add_argument("--json", action="store_true", help="print the result as JSON")
    export.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from echox.engine.object_store.reading import local_run
    from echox.release.export import export

    files = export(
        local_run(args.trained), args.out, args.form, dtype=args.dtype, with_encoder=args.with_encoder
    )
    _report(args.out, files, args.form, as_json=args.json)
    return 0


def _report(out: Path, files: dict[str, int], form: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "format": form, "files": files}))
        return
    for name, size in files.items():
        print(f"{size / 2**20:10.1f} MiB  {name}")
    print(f"{out} ({form}; see its README.md)")
