"""Parses the command line that a job and its driver share, and names their exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback

from echox.errors import EchoXError
from echox.train import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP, ALLOW, ALLOW_HELP, comma_list

ABORTED = 130
CRASHED = 70
"""Exit code of a driver that met something unforeseen; the job's is 1."""
AGAIN = 75
"""Exit code of a driver that saved and ended because of its nodes, to be started again."""
DEFAULT_SETUP = "echox.builders.setup:build_setup"


def arguments(prog: str) -> argparse.ArgumentParser:
    """What the job takes; the driver takes the same."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train one stage, or a vocoder, on the Ray cluster this job runs in.",
        epilog="Example: ray job submit --working-dir . -- python -m launch.train demo/s2t optim.steps=20",
    )
    parser.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    parser.add_argument(ALLOW, type=comma_list, default=[], metavar="KEY,...", help=ALLOW_HELP)
    parser.add_argument("--debug", action="store_true", help="print tracebacks of user errors too")
    # Other parts may stand in for the engine and the stages, as the tests do.
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--setup", default=DEFAULT_SETUP, help=argparse.SUPPRESS)
    # From the supervisor to its driver.
    parser.add_argument("--restart", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def said(error: EchoXError, *, debug: bool) -> int:
    """Print an error as the last line of the job's output; returns its exit code."""
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code
