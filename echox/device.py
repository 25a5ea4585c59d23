"""Chooses where a process computes: on a GPU where there is one, unless `ECHOX_DEVICE=cpu` or the recipe wants none."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from echox.errors import LaunchError

if TYPE_CHECKING:
    from echox.config.run_recipe import RunRecipe

DEVICE = "ECHOX_DEVICE"
"""Environment variable: `cpu` leaves GPUs alone; `cuda` insists on one; not set, a GPU is used where there is one."""


def cpu_is_wanted() -> bool:
    """Whether the environment asks for the CPU.

    Raises:
        LaunchError: it asks for something that there is not.
    """
    wanted = os.environ.get(DEVICE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise LaunchError(f"{DEVICE}={wanted} names no device", fix=f"set {DEVICE} to cpu or cuda, or unset it")
    return wanted == "cpu"


def usable_gpus() -> int:
    """How many GPUs this process may use; torch is asked only where the CPU is not.

    Raises:
        LaunchError: as `cpu_is_wanted`, or a GPU is wanted and there is none.
    """
    if cpu_is_wanted():
        return 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and os.environ.get(DEVICE) == "cuda":
        raise LaunchError(f"{DEVICE}=cuda, but torch sees no GPU", fix=f"look at `nvidia-smi`, or unset {DEVICE}")
    return count


def best_device() -> str:
    """`cuda` or `cpu`, for a process that computes alone."""
    return "cuda" if usable_gpus() else "cpu"


def follow_recipe(recipe: RunRecipe, environment: MutableMapping[str, str] = os.environ) -> None:
    """Leave GPUs alone where a recipe's workers have none; a device that the environment names stands."""
    if recipe.scaling.gpus_per_worker == 0:
        environment.setdefault(DEVICE, "cpu")
