"""Trains a recipe that answers again, run after run in one process; `refresh_worker.py RECIPE FOLDER DIE_AFTER`.

One run, `whole`, is left alone; another ends at the beginning of the step after DIE_AFTER, and is begun again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from echox.builders.setup import build_setup
from echox.config.load import load_recipe
from echox.engine.context import LocalContext
from echox.engine.loop import Loop
from echox.engine.trainer import train

_train = Loop._train


class Killed(BaseException):
    """Stands for the end of the process."""


def run(context: LocalContext, folder: Path, die_after: int) -> None:
    recipe = load_recipe(sys.argv[1], [f"storage={folder}"])
    context.storage = folder

    def train_or_die(loop: Loop, first: int) -> None:
        if loop.state.step == die_after:
            raise Killed
        _train(loop, first)

    Loop._train = train_or_die  # type: ignore[method-assign]
    try:
        train(recipe, context, build_setup)
    except Killed:
        return
    assert die_after < 0, "it did not come so far"


with LocalContext(Path(sys.argv[2])) as context:
    for name, step in (("whole", -1), (sys.argv[3], int(sys.argv[3])), (sys.argv[3], -1)):
        if not (name == "whole" and (Path(sys.argv[2]) / name).exists()):
            run(context, Path(sys.argv[2]) / name, step)
