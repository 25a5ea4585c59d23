"""A process of the engine tests: runs a list of scenarios one after the other and writes what came out.

Started plainly (a world of one) or by torchrun; `python worker.py PLAN`, see `launching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launching import Context, work
from toy import ToyBuild, ToyOptions, toy_recipe

from echox.engine.trainer import train
from echox.errors import EchoXError


class Killed(Exception):
    """Stands for a crash right after a checkpoint."""


class Scenario:
    """A context that may 'crash' when told of a checkpoint."""

    def __init__(self, inner: Context, die_at: int | None) -> None:
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

    def stop_requested(self) -> str | None:
        return None


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **scenario.get("recipe", {}))
    options = ToyOptions(**scenario.get("options", {}))
    build = ToyBuild(options, Path(plan["frozen"]), scenario.get("data", "toy"))
    try:
        result = train(
            recipe,
            Scenario(context, scenario.get("die_at")),
            build,
            accept_new_data=scenario.get("accept", False),
            allow=scenario.get("allow", ()),
        )
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
        "stopped": result.stopped,
    }


if __name__ == "__main__":
    work(run)
