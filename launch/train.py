"""`python -m launch.train RECIPE [key=value ...]`: runs a recipe, as the entry point of a Ray job.

This process is light and stays: it checks the recipe, runs the driver (`launch.job.driver`) as a child, and starts it
again when it was killed, crashed, or ended only to go on with other nodes. What the driver says of the user's own
mistakes is final.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from echox.config.load import load_recipe
from echox.config.paths import run_dir
from echox.engine.object_store.run_store import RunStore
from echox.errors import EchoXError
from launch import paths
from launch.events import DRIVER_FILE, LOG, JobLog
from launch.job.command_line import arguments, said
from launch.job.supervisor import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code: 0 (also after an orderly stop), an `EchoXError`'s own, 1 for a bug, 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments("python -m launch.train").parse_intermixed_args(words)
    try:
        recipe = paths.make_absolute(load_recipe(args.recipe, args.overrides), paths.home())
    except EchoXError as error:
        return said(error, debug=args.debug)
    log = JobLog(run_dir(recipe.storage, recipe.name))
    log("begin", pid=os.getpid())
    code = Supervisor(words, log, budget=recipe.scaling.max_failures).run()
    store = RunStore.of(recipe.storage, recipe.name)
    if store is not None:
        with contextlib.suppress(EchoXError):  # the driver, which is gone, has sent all but the last lines
            store.write(f"{LOG}/{DRIVER_FILE}", log.path.read_bytes())
    return code


if __name__ == "__main__":
    sys.exit(main())
