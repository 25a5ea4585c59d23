"""Says how many nodes of which size a recipe needs, whoever provides them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echox.errors import LaunchError

if TYPE_CHECKING:
    from echox.config.run_recipe import RunRecipe

GPU_WORKERS_A_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The nodes of a run, and its command.

    Attributes:
        run: its name.
        words: of the command that trains it, from `python` on.
        least, most: nodes; the same number unless the recipe takes as many workers as there is room for.
        gpus, cpus: of a node.
    """

    run: str
    words: tuple[str, ...]
    least: int
    most: int
    gpus: int
    cpus: int

    @property
    def resource_name(self) -> str:
        """The run's name in the letters that Kubernetes allows."""
        return re.sub(r"[^a-z0-9-]+", "-", self.run.lower()).strip("-")[:40] or "run"


def plan_of(recipe: RunRecipe, words: Sequence[str], workers_a_node: int | None = None) -> Plan:
    """Nodes for the workers of a recipe.

    Args:
        recipe: what is to be trained.
        words: arguments of `python -m launch.train`.
        workers_a_node: ranks on one node; None is 8 with GPUs, and 1 without.

    Raises:
        LaunchError: the workers do not fill whole nodes.
    """
    scaling = recipe.scaling
    least, most = scaling.bounds
    each = workers_a_node or min(most, GPU_WORKERS_A_NODE if scaling.gpus_per_worker else 1)
    if least % each and least > each:
        raise LaunchError(
            f"{least} workers do not fill nodes of {each}",
            where="scaling.workers",
            fix="name another number by --workers-per-node",
        )
    return Plan(
        run=recipe.name,
        words=("python", "-m", "launch.train", *words),
        least=math.ceil(least / each),
        most=max(1, most // each),
        gpus=math.ceil(each * scaling.gpus_per_worker),
        cpus=math.ceil(each * scaling.cpus_per_worker),
    )
