"""A process of the engine tests: runs a list of scenarios one after the other and writes what came out.

Started plainly (a world of one) or by torchrun; `python worker.py PLAN`, where PLAN is a JSON file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from toy import ToyBuild, ToyOptions, toy_recipe

from echox.engine.context import LocalContext, TorchrunContext
from echox.engine.train import train
from echox.errors import EchoXError


class Killed(Exception):
    """Stands for a crash right after a checkpoint."""


class Scenario:
    """A context that may 'crash' when told of a checkpoint."""

    def __init__(self, inner: LocalContext | TorchrunContext, die_at: int | None) -> None:
        self.rank, self.world_size, self.local_rank = inner.rank, inner.world_size, inner.local_rank
        self.storage, self.checkpoint_in = inner.storage, None
        self.die_at = die_at

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None) -> None:
        if (
            checkpoint_dir is not None
            and self.die_at is not None
            and checkpoint_dir.name.endswith(f"{self.die_at:08d}")
        ):
            raise Killed


def run(plan: dict[str, Any], context: LocalContext | TorchrunContext, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **scenario.get("recipe", {}))
    options = ToyOptions(**scenario.get("options", {}))
    build = ToyBuild(options, Path(plan["frozen"]), scenario.get("data", "toy"))
    try:
        accept = scenario.get("accept", False)
        result = train(recipe, Scenario(context, scenario.get("die_at")), build, accept_new_data=accept)
    except Killed:
        return {"killed": True}
    except EchoXError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {
        "step": result.step,
        "metrics": dict(result.metrics),
        "unmoved": list(result.unmoved_trainable),
        "moved_frozen": list(result.moved_frozen),
        "already_done": result.already_done,
        "checkpoint": str(result.checkpoint),
    }


def main() -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    kind = TorchrunContext if TorchrunContext.detected() else LocalContext
    outcomes = {}
    with kind(plan["storage"]) as context:
        for scenario in plan["scenarios"]:
            outcomes[scenario.get("label", scenario["name"])] = run(plan, context, scenario)
    if context.rank == 0:
        Path(plan["out"]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
