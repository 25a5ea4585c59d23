"""Retries operations that may succeed later, and gives up with one clear error."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from echox.errors import TransientReadError

T = TypeVar("T")

# What a network file system or a failing disk may answer once and not the next time.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EREMOTEIO", "ENOLINK"),
        *("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
    )
)


class PassingError(Exception):
    """A transient failure: the same request may succeed later."""


def may_pass(error: OSError) -> bool:
    """Whether an operating system error is transient: the same call may succeed later."""
    return error.errno in _PASSING


@dataclass(frozen=True)
class Retry:
    """How often an operation is tried, and the waits in between.

    Attributes:
        attempts: in all.
        first_wait_s: before the second attempt; doubled before each later one.
        longest_wait_s: bound of the doubling.
    """

    attempts: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0

    def __call__(self, operation: Callable[[], T], what: str, where: str) -> T:
        """Result of an operation, tried again after each `PassingError`.

        Raises:
            TransientReadError: it failed every time.
        """
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1)))
            try:
                return operation()
            except PassingError as error:
                reason = str(error)
        raise TransientReadError(
            f"{what} failed {self.attempts} times, last: {reason}",
            where=where,
            fix="repair the storage or network, then resume",
        )
