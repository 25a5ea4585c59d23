"""Runs `launch.evaluate` on the stand-ins of the benchmarks' tests; the process of the second share is killed once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import evaluate

LINE, SHARE = 2, 0.5
"""The line of answers in the middle of whose writing it is killed."""


def answer(words: Sequence[str]) -> int:
    """A share, in a process of the cluster."""
    from tests.evaluate.benchmarks.killed import _killed_at
    from tests.evaluate.benchmarks.world import stand_in

    stand_in(pytest.MonkeyPatch())
    with open(os.environ["ECHOX_TEST_LOG"], "a") as log:
        log.write(f"{words[-1]}\n")
    begun = Path(os.environ["ECHOX_TEST_LOG"]).read_text().splitlines()
    if words[-1].startswith("1/") and begun.count(words[-1]) == 1:
        _killed_at(LINE, SHARE)
    return evaluate._evaluate(words)


if __name__ == "__main__":
    from tests.evaluate.benchmarks.world import stand_in

    stand_in(pytest.MonkeyPatch())
    evaluate._answer = answer
    sys.exit(evaluate.main())
