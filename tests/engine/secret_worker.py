"""Trains the toy stage as `echox train` would, tracked in SQLite below its storage; its argument is a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launching import prepare
from toy import ToyBuild, ToyOptions, toy_recipe

from echox import train as train_command
from echox.builders import setup
from echox.engine.context import LocalContext

if __name__ == "__main__":
    folder = prepare(Path(sys.argv[1]))
    setup.build_setup = ToyBuild(ToyOptions(), folder / "frozen")  # type: ignore[assignment]
    recipe = toy_recipe("toy", folder / "ds.json", optim__steps=2, optim__warmup_steps=1)
    options = argparse.Namespace(accept_new_data=False, allow=[], recipe="toy", json=True)
    with LocalContext(folder / "runs") as context:
        train_command._print_result(recipe, train_command._tracked(recipe, options, context), as_json=True)
