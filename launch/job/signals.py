"""Turns signals into requests: the first asks for a stop, the second insists; and ends children with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

RELAYED_STOP, RELAYED_ABORT = signal.SIGUSR1, signal.SIGUSR2
"""What the supervisor sends its driver. Ray sends its stop signal to both of them, and the same request that arrives
twice must not pass for a second one."""
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """Counts what arrived.

    Args:
        then: called after each signal, in the main thread, wherever that is.

    Attributes:
        why: name of the first signal; empty until one arrived.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.why = ""
        self._then = then
        self._own = 0
        self._relayed_abort = False

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and the supervisor's signals; main thread only.

        Ray blocks SIGINT in what it starts, except where SIGINT is its stop signal; and its core sets an alarm on
        SIGTERM, to end the process. To be called again after Ray has connected.
        """
        signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGINT, RELAYED_STOP, RELAYED_ABORT):
            signal.signal(number, self._heard)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self.why)

    @property
    def abort_requested(self) -> bool:
        """Whether it was asked for a second time."""
        return self._own > 1 or self._relayed_abort

    def _heard(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number in (signal.SIGTERM, signal.SIGINT):
            self._own += 1
        elif number == RELAYED_ABORT:
            self._relayed_abort = True
        else:
            name = signal.SIGTERM.name
        self.why = self.why or name
        self._then()


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however it ends; ends at once if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the supervisor {parent} is gone")
