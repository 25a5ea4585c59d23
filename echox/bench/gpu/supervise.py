"""Runs the cells in a process of its own, and starts another where that one hangs, crashes or loses the device."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from echox.bench.gpu.results import Results
from echox.errors import EchoXError

POLL_S = 0.25
BROKEN = 75
"""Exit code of a process whose device no longer answers; another process goes on."""


def supervise(
    command: Sequence[str],
    path: Path,
    until: float,
    *,
    grace_s: float = 60.0,
    say: Callable[[str], None] = print,
) -> None:
    """Run `command` until it ends by itself; a cell at which it does not is a row of its own, and the others go on.

    Args:
        command: runs cells and notes them in the results.
        path: of the results.
        until: no cell begins after this moment.
        grace_s: by which a process may outlive it.
        say: told of every cell that ended the process.

    Raises:
        EchoXError: it ended before any cell, or at the same place twice.
    """
    while True:
        process = subprocess.Popen(command, env=environment())
        try:
            code = _watch(process, path, until + grace_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code == 0:
            return
        results = Results(path)
        running = results.running
        if running is not None:
            why = "it hung, and was ended" if code is None else f"it ended its process ({_how(code)})"
            results.end(running["cell"], "failed", why=why, seconds=time.time() - running["since"])
            say(f"{running['cell']}: failed: {why}")
        elif code != BROKEN:
            raise EchoXError(f"the measurement ended with {_how(code)} before a cell", fix="see its last lines above")
        if time.time() > until:
            return


def environment() -> dict[str, str]:
    """As a worker of a run has it: memory in segments that grow, unless told otherwise."""
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}


def _watch(process: subprocess.Popen[bytes], path: Path, end: float) -> int | None:
    """The exit code, or None for a process that hangs."""
    while (code := process.poll()) is None:
        time.sleep(POLL_S)
        running = Results(path).running if path.exists() else None
        now = time.time()
        if now > end:
            return None
        if running is not None and now > running["since"] + running["limit"]:
            return None
    return code


def _how(code: int | None) -> str:
    if code is None:
        return "no end"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
