"""Writes down the command that makes the same scores again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def evaluate_command(run: str, options: Mapping[str, object]) -> str:
    """`echox evaluate RUN` with options by name, those that are None left out."""
    given = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    return shlex.join(["echox", "evaluate", run, *given])
