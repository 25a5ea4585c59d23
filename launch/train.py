"""`python -m launch.train RECIPE [key=value ...]`: runs a recipe, as the entry point of a Ray job.

This process is light and stays: it checks the recipe, runs the driver (`launch.job.driver`) as a child, and starts it
again when it was killed, crashed, or ended only to go on with other nodes. What the driver says of the user's own
mistakes is final. Where the head has a webhook, it is told once how the job ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from echox.config.paths import run_dir
from echox.engine.object_store.run_store import RunStore
from echox.errors import EchoXError
from launch import paths
from launch.events import DRIVER_FILE, LOG, JobEvent, JobLog, driver_events, read_progress
from launch.job.command_line import arguments, said
from launch.job.ending import Ending
from launch.job.supervisor import Supervisor
from launch.job.webhook import Webhook
from launch.recipe import JobRecipe, load_job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code: 0 (also after an orderly stop), an `EchoXError`'s own, 1 for a bug, 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments("python -m launch.train").parse_intermixed_args(words)
    webhook = Webhook.take()
    try:
        recipe = paths.make_absolute(load_job(args.recipe, args.overrides), paths.home())
    except EchoXError as error:
        code = said(error, debug=args.debug)
        if webhook is not None:
            webhook.post(Ending(status="failed", why=str(error)).message(run=args.recipe, stage="", step=0))
        return code
    run_folder, began, code = run_dir(recipe.storage, recipe.name), time.time(), 1
    try:
        log = JobLog(run_folder)
        log("begin", pid=os.getpid())
        code = Supervisor(words, log, budget=recipe.scaling.max_failures).run()
    finally:
        _send_log(recipe, run_folder)
        if webhook is not None:
            ending = Ending.of(code, _events_since(began, run_folder))
            step = read_progress(run_folder).get("step", 0)
            webhook.post(ending.message(run=recipe.name, stage=recipe.stage, step=step))
    return code


def _send_log(recipe: JobRecipe, run_folder: Path) -> None:
    """The driver, which is gone, has sent all but its last lines to an object store."""
    store = RunStore.of(recipe.storage, recipe.name)
    if store is not None:
        with contextlib.suppress(EchoXError, OSError):
            store.write(f"{LOG}/{DRIVER_FILE}", (run_folder / LOG / DRIVER_FILE).read_bytes())


def _events_since(began: float, run_folder: Path) -> list[JobEvent]:
    events: list[JobEvent] = []
    with contextlib.suppress(OSError):  # a storage that cannot be read may be why the job ends
        events = driver_events(run_folder)
    return [event for event in events if event["time"] >= round(began, 3)]


if __name__ == "__main__":
    sys.exit(main())
