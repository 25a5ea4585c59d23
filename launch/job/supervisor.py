"""Keeps the driver of a job running: starts it again when it was killed, crashed, or ended only for other nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from echox.errors import EchoXError
from launch.events import ENDS, JobLog, driver_events
from launch.job.command_line import ABORTED, AGAIN, CRASHED, said
from launch.job.signals import RELAYED_ABORT, RELAYED_STOP, StopSignals


class Supervisor:
    """Keeps one driver running.

    Args:
        words: command line of the driver.
        log: of the run.
        budget: deaths and crashes of the driver that are survived.
    """

    def __init__(self, words: Sequence[str], log: JobLog, *, budget: int, module: str = "launch.job.driver") -> None:
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
                return ABORTED if self.signals.abort_requested else 0 if code < 0 or code == AGAIN else code
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
            self._driver.send_signal(RELAYED_ABORT if self.signals.abort_requested else RELAYED_STOP)
