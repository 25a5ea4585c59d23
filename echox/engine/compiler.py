"""Looks before a run for what compiled parts of it will need on each node: a compiler, and Python's headers."""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from echox.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from echox.engine.world import World

_COMPILERS = {"cuda": ("CC", ("gcc", "clang")), "cpu": ("CXX", ("g++",))}
"""Kind of device to the variable, and without it the names, by which Triton and Inductor find a compiler."""


def check_compiler(wanted: bool, world: World) -> None:
    """Refuse a run that would end at its first step; every rank calls it.

    Args:
        wanted: the recipe's `engine.compile`.
        world: the processes, each with its device.

    Raises:
        RecipeError: a node lacks what compiling needs; on every rank.
    """
    if not wanted:
        return
    found = world.all_gather((socket.gethostname(), missing_for(world.device)))
    lacking = {host: what for host, what in found if what}
    if lacking:
        raise RecipeError(
            f"engine.compile=true needs a compiler on every node: {'; '.join(map(': '.join, lacking.items()))}",
            fix="install gcc, g++ and Python's headers there, or set engine.compile=false",
        )


def missing_for(device: torch.device, environment: Mapping[str, str] = os.environ) -> str:
    """What is not there to compile for a device, in words; empty where nothing is missing."""
    variable, names = _COMPILERS.get(device.type, _COMPILERS["cpu"])
    named = environment.get(variable)
    if named and not shutil.which(named, path=environment.get("PATH")):
        return f"{variable}={named} is no program"
    if not named and not any(shutil.which(name, path=environment.get("PATH")) for name in names):
        return f"no {' or '.join(names)} in PATH, and no {variable}"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if headers.is_file() else f"no {headers}"
