"""`echox`: finds the command, runs it, and turns errors into one sentence and an exit code.

A command lives in the module that owns its subject and enters through `add_parser(subparsers)`, which sets
`run(args) -> int | None` as its default; only the module of the command asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from echox.errors import EchoXError, printable

# Command -> module that registers it; several commands may share a module.
COMMANDS: dict[str, str] = {
    "train": "echox.train",
    "respond": "echox.respond",
    "export": "echox.release.cli",
    "import": "echox.release.cli",
    "recipe": "echox.config.cli",
    "checkpoint": "echox.engine.checkpoint.cli",
    "submit": "launch.cli",
    "resume": "launch.cli",
    "status": "launch.cli",
    "logs": "launch.cli",
    "stop": "launch.cli",
    "shards": "shards.cli",
    "units": "echox.units.cli",
    "unit-language": "echox.units.cli",
    "vocoder": "echox.vocoder.cli",
    "speak": "echox.speak.cli",
    "serve": "echox.serve.cli",
    "evaluate": "echox.evaluate.cli",
    "report": "echox.evaluate.cli",
    "listen": "echox.evaluate.listen",
    "voices": "echox.evaluate.voices_cli",
    "runs": "echox.tracking.cli",
    "bench": "launch.recovery",
    "plan": "echox.bench.plan.cli",
    "ablate": "launch.ablation.cli",
    "sweep": "launch.sweep.cli",
    "new": "launch.project.cli",
    "run": "launch.project.cli",
    "doctor": "launch.client.cluster_doctor",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, the error's own code for what a user can act on, 1 for anything unforeseen, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("ECHOX_DEBUG"))
    try:
        args = build_parser(words).parse_args(words)
        code = args.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`echox ... | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EchoXError as error:
        if debug:
            raise
        print(printable(f"echox: {error}"), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        said = f"echox: {type(error).__name__}: {error}. Fix: run again with --debug for the traceback"
        print(printable(said), file=sys.stderr)
        return 1


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `words` name, or of all commands where they name none (as for --help)."""
    parser = argparse.ArgumentParser(
        prog="echox",
        description="Train, run and measure EchoX speech-to-speech models.",
        epilog="example: echox train demo/s2t optim.steps=10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for module in dict.fromkeys([COMMANDS[asked]] if asked in COMMANDS else COMMANDS.values()):
        importlib.import_module(module).add_parser(subparsers)
    for command in subparsers.choices.values():
        _accept_debug(command)
    return parser


def _accept_debug(parser: argparse.ArgumentParser) -> None:
    """Let --debug also follow the command, at any depth."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _accept_debug(child)
