"""The entry point of a Ray job: `python -m launch.train RECIPE [key=value ...]`.

This process is light and stays: it checks the recipe, runs the driver (`launch.driver`) as a child, and starts it again
when it was killed, crashed, or ended only to go on with other nodes. What the driver says of the user's own mistakes is
final.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from echox.config.load import load_recipe
from echox.errors import EchoXError
from echox.train import ACCEPT_NEW_DATA, ACCEPT_NEW_DATA_HELP, ALLOW, ALLOW_HELP, comma_list
from launch import places
from launch.events import ENDS, JobLog, driver_events
from launch.signals import RELAYED_ABORT, RELAYED_STOP, StopSignals

ABORTED = 130
CRASHED = 70
"""Exit code of a driver that met something unforeseen; the job's is 1."""
AGAIN = 75
"""Exit code of a driver that saved and ended because of its nodes, to be started again."""
DEFAULT_TRAIN = "echox.engine.train:train"
DEFAULT_SETUP = "echox.builders.setup:build_setup"


def arguments(prog: str) -> argparse.ArgumentParser:
    """What the job takes; the driver takes the same."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train one stage on the Ray cluster this job runs in.",
        epilog="Example: ray job submit --working-dir . -- python -m launch.train demo/s2t optim.steps=20",
    )
    parser.add_argument("recipe", help="YAML file, or a short name such as demo/s2t")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument(ACCEPT_NEW_DATA, action="store_true", help=ACCEPT_NEW_DATA_HELP)
    parser.add_argument(ALLOW, type=comma_list, default=[], metavar="KEY,...", help=ALLOW_HELP)
    parser.add_argument("--debug", action="store_true", help="print tracebacks of user errors too")
    # Other parts may stand in for the engine and the stages, as the tests do.
    parser.add_argument("--train", default=DEFAULT_TRAIN, help=argparse.SUPPRESS)
    parser.add_argument("--setup", default=DEFAULT_SETUP, help=argparse.SUPPRESS)
    # From the supervisor to its driver.
    parser.add_argument("--restart", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code: 0 (also after an orderly stop), an `EchoXError`'s own, 1 for a bug, 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments("python -m launch.train").parse_intermixed_args(words)
    try:
        recipe = places.anchor(load_recipe(args.recipe, args.overrides), places.home())
    except EchoXError as error:
        return said(error, debug=args.debug)
    log = JobLog(Path(recipe.storage) / recipe.name)
    log("begin", pid=os.getpid())
    return Supervisor(words, log, budget=recipe.scaling.max_failures).run()


class Supervisor:
    """Keeps one driver running.

    Args:
        words: command line of the driver.
        log: of the run.
        budget: deaths and crashes of the driver that are survived.
    """

    def __init__(self, words: Sequence[str], log: JobLog, *, budget: int, module: str = "launch.driver") -> None:
        self.words = list(words)
        self.log = log
        self.budget = budget
        self.module = module
        self.signals = StopSignals(self._relay)
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the driver until its end is final; returns the job's exit code."""
        self.signals.listen()
        restarts = failures = 0
        while True:
            began = time.time()
            code = self._once(restarts)
            if self.signals.asked:
                # A driver that a signal ends had not begun, or was not to finish.
                return ABORTED if self.signals.insisted else 0 if code < 0 or code == AGAIN else code
            if code == 0 or (code > 0 and code not in (AGAIN, CRASHED) and self._said_why(began)):
                return code
            if code != AGAIN:
                failures += 1
                how = f"the driver was killed by {signal.Signals(-code).name}" if code < 0 else "the driver crashed"
                again = failures <= self.budget
                self.log("driver_lost", error=how, decision=f"again, {self.budget - failures} left" if again else "end")
                if not again:
                    return said(
                        EchoXError(
                            f"{how}, and scaling.max_failures={self.budget} allows no other",
                            where=self.log.run_folder.name,
                            fix="submit the recipe again: it continues from its checkpoint",
                        ),
                        debug=False,
                    )
            restarts += 1

    def _once(self, restarts: int) -> int:
        """Run one driver; a negative code is the signal that ended it."""
        more = ["--restart", str(restarts), "--parent", str(os.getpid())]
        # A stop that arrives between the look and the start is relayed by the second look.
        self._driver = subprocess.Popen([sys.executable, "-m", self.module, *self.words, *more])
        if self.signals.asked:
            self._relay()
        return self._driver.wait()

    def _said_why(self, began: float) -> bool:
        """Whether the driver ended by its own decision: a native library that ends the process gives a code as well."""
        events = driver_events(self.log.run_folder)
        return any(event["event"] in ENDS and event["time"] >= round(began, 3) for event in events)

    def _relay(self) -> None:
        if self._driver is not None and self._driver.returncode is None:
            self._driver.send_signal(RELAYED_ABORT if self.signals.insisted else RELAYED_STOP)


def said(error: EchoXError, *, debug: bool) -> int:
    """Print an error as the job's last word; returns its exit code."""
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
