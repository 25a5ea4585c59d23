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

    importing = subparsers.add_parser(
        "import",
        help="make a folder of a released EchoX model that speaks, and that Stage III goes on from",
        description="Make a folder of a released EchoX model, which `echox speak` and `serve` take as a run and Stage "
        "III as init. What does not fit is refused, all of it at once; what only the files can tell is printed.",
        epilog="example: echox import EchoX-3B echox-3b --encoder openai/whisper-large-v3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importing.add_argument("release", type=Path, metavar="RELEASE", help="folder of the released model")
    importing.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be new")
    importing.add_argument(
        "--encoder",
        default="openai/whisper-large-v3",
        help="the Whisper model it was trained with, which is not part of it: folder, or name below "
        "$ECHOX_CACHE/models; default: %(default)s",
    )
    importing.add_argument("--system", default="", help="what the system turn of the prompt says; default: nothing")
    importing.add_argument(
        "--drop-unknown", action="store_true", help="leave out tensors that belong to no release, which are refused"
    )
    importing.add_argument("--json", action="store_true", help="print the result as JSON")
    importing.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """Import, and say what only the files could tell."""
    from echox.errors import printable
    from echox.release.echox_format.importing import import_release

    findings = import_release(
        args.release, args.out, encoder=args.encoder, system=args.system, drop_unknown=args.drop_unknown
    )
    if args.json:
        print(json.dumps({"out": str(args.out), "findings": findings}))
        return 0
    for subject, said in findings.items():
        print(printable(f"{subject}: {said}"))
    print(f"{args.out} (see its README.md)")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from echox.engine.object_store.reading import local_run
    from echox.release.export import export

    files = export(local_run(args.trained), args.out, args.form, dtype=args.dtype, with_encoder=args.with_encoder)
    _report(args.out, files, args.form, as_json=args.json)
    return 0


def _report(out: Path, files: dict[str, int], form: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"out": str(out), "format": form, "files": files}))
        return
    for name, size in files.items():
        print(f"{size / 2**20:10.1f} MiB  {name}")
    print(f"{out} ({form}; see its README.md)")
