"""`python -m echox.tracking.watcher RUN PID START`: ends the MLflow run of a process that died before it could.

It watches the run's owner from a session of its own and leaves by itself when the owner has ended the run. Until it
has to act it imports neither MLflow nor anything else that is large.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import echox
from echox.tracking.lifecycle import finish_pending, make_client
from echox.tracking.state import BEAT_S, Process, beat, read_state, unfinished

if TYPE_CHECKING:
    from echox.tracking.client import RunHandle

log = logging.getLogger("echox.tracking")

POLL_S = 0.5
GRACE_S = 60.0
"""How long an owner that has ended the run may go on to deliver it before the watcher takes over."""
WORKERS_S = 2.0
"""Workers outlive a driver that was killed by a moment, and write until they notice."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 300.0


def start_watcher(handle: RunHandle, *, hours: float) -> None:
    """Start the watcher of a run that this process owns; it outlives this process, its session and its job.

    Args:
        handle: the run.
        hours: how long it tries to reach the server when the run has ended.
    """
    me = Process.current()
    words = [sys.executable, "-m", __name__, str(handle.run_folder), str(me.pid), str(me.start), str(hours)]
    paths = [str(Path(echox.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    quiet = subprocess.DEVNULL
    # The process started here only starts the watcher and ends: a job's children are killed with it, orphans are not.
    try:
        subprocess.run(
            words, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "no watcher for run %s (%s): if this process is killed, its run stays open until `echox runs list`",
            handle.run_folder.name,
            error,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Fork, watch, act."""
    folder, pid, start, hours = sys.argv[1:] if argv is None else argv
    owner = replace(Process.current(), pid=int(pid), start=int(start))
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the owner must not end its watcher
    os.chdir("/")
    watch(Path(folder), owner, hours=float(hours))
    return 0


def watch(run_folder: Path, owner: Process, *, hours: float) -> None:
    """Wait until the owner has ended the run or is gone, then make sure that the server records the end."""
    beaten = 0.0
    while owner.alive():
        state = read_state(run_folder)
        if not _ours(state, owner):
            return
        if time.time() - (state["ended"] or time.time()) > GRACE_S:
            break
        if time.monotonic() - beaten > BEAT_S:
            beaten = time.monotonic()
            beat(run_folder)
        time.sleep(POLL_S)
    if _ours(read_state(run_folder), owner):
        time.sleep(WORKERS_S)
        _act(run_folder, owner, deadline=time.monotonic() + hours * 3600)


def _act(run_folder: Path, owner: Process, *, deadline: float) -> None:
    """Settle the run, later and later while the server does not answer, unless another owner takes it over."""
    delay = FIRST_RETRY_S
    while True:
        state = read_state(run_folder)
        if not _ours(state, owner):
            return
        try:
            status = finish_pending(make_client(state["uri"]), run_folder, owner)
        except Exception as error:
            _note(run_folder, f"the run could not be ended: {type(error).__name__}: {str(error)[:300]}")
        else:
            if status is not None:
                _note(run_folder, f"process {owner.pid} on {owner.host} is gone; the run is {status}")
            return
        if time.monotonic() + delay > deadline:
            _note(run_folder, "no further attempt; `echox runs list` ends the run when the server is back")
            return
        time.sleep(delay)
        delay = min(LONGEST_RETRY_S, 2 * delay)


def _ours(state: dict[str, Any], owner: Process) -> bool:
    """Whether the run is still this owner's and the server does not know its end yet."""
    return unfinished(state) and Process.of(state.get("owner")) == owner


def _note(run_folder: Path, text: str) -> None:
    with contextlib.suppress(OSError), (run_folder / "mlflow-watcher.log").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


if __name__ == "__main__":
    sys.exit(main())
