"""`python -m launch.demo`: parses the command line of the demo and runs it."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from echox.config.paths import project_root
from echox.errors import EchoXError
from launch.demo.pipeline import STAGES, Demo
from shards.demo.plan import SCALES

QUICK = {
    # One worker each: most of a quick stage is the start of its processes.
    "s2t": ("optim.steps=3", "model.ctc.align_steps=1", "scaling.workers=1"),
    "t2c": ("optim.steps=3", "scaling.workers=1"),
    "echo": ("optim.steps=3", "model.echo.denoising.align_steps=1", "model.echo.units_per_token=2"),
}
QUICK_ALWAYS = ("optim.warmup_steps=1", "data.global_batch=4", "data.micro_batch=2")
QUICK_LIMIT = 6
QUICK_EVALUATED = 2
QUICK_VOCODER_STEPS = 10
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 on success, the error's own code when a phase fails, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    overrides = {stage: tuple(QUICK_ALWAYS + QUICK[stage]) if args.quick else () for stage in STAGES}
    for words in args.set:
        stage, _, override = words.partition(".")
        if stage not in STAGES or "=" not in override:
            console.print(f"error: --set {words} is not STAGE.key=value with a stage of {', '.join(STAGES)}")
            return 2
        overrides[stage] += (override,)
    cut = "-quick" if args.quick else "" if args.limit is None else f"-{args.limit}"
    demo = Demo(
        storage=(args.storage or project_root() / "runs" / f"{args.scale}{cut}").absolute(),
        console=console,
        limit=args.limit or (QUICK_LIMIT if args.quick else None),
        evaluated=QUICK_EVALUATED if args.quick else None,
        overrides=overrides,
        repeat=tuple(args.repeat),
        vocoder_steps=QUICK_VOCODER_STEPS if args.quick else None,
        scale=args.scale,
        command=shlex.join(["python", "-m", "launch.demo", *(sys.argv[1:] if argv is None else argv)]),
    )
    try:
        demo.run()
        demo.show()
    except KeyboardInterrupt:
        console.print("interrupted; everything started here is stopped. Run the same command again to continue")
        return INTERRUPTED
    except EchoXError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except Exception as error:
        (demo.storage / "error.txt").write_text(traceback.format_exc())
        if args.debug:
            raise
        console.print(
            f"error: {type(error).__name__}: {error} [{demo.storage / 'error.txt'}]",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description="Fetch models, build a corpus, train the three stages on this machine, evaluate, report.",
        epilog="example: python -m launch.demo --repeat echo --set echo.optim.steps=80",
    )
    parser.add_argument("--quick", action="store_true", help="a few samples and steps: checks that everything works")
    parser.add_argument("--scale", choices=SCALES, default="demo", help="small: a night on two cores, minutes on a GPU")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of each corpus set at most")
    parser.add_argument("--storage", type=Path, metavar="FOLDER", help="folder of runs; default: runs/demo")
    parser.add_argument("--repeat", action="append", default=[], choices=STAGES, help="train this stage again")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.key=value", help="override a recipe")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an unexpected error")
    return parser


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
