"""A process of the stream test: Stage II on real shards, run after run; `stream_worker.py PLAN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import Context, work
from toy import toy_recipe
from worker import Killed, Scenario

from echox.config.schema import Recipe
from echox.engine.data import open_sources, train_reader, valid_readers
from echox.engine.interfaces import StageSetup
from echox.engine.train import train
from echox.errors import EchoXError
from echox.stream.collate import UnitCollate
from tests import tiny


@dataclass(frozen=True)
class Build:
    """The injected build function: what `echox.engine.setup` does, around a tiny Stage II."""

    frozen: Path

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        collate = UnitCollate(lambda text: [12 + ord(c) % 30 for c in text], lambda units: (units % 9).tolist())
        train_sources, valid_sources = open_sources(recipe.data.train), open_sources(recipe.data.valid)
        return StageSetup(
            module=tiny.t2c_stage(),
            train_loader=train_reader(recipe, train_sources, collate, rank, world_size),
            valid_loaders=valid_readers(recipe, valid_sources, collate, rank, world_size),
            frozen_models={"tower": self.frozen},
        )


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **scenario["recipe"])
    try:
        result = train(
            recipe,
            Scenario(context, scenario.get("die_at")),
            Build(Path(plan["frozen"])),
            accept_new_data=scenario.get("accept", False),
        )
    except Killed:
        return {"killed": True}
    except EchoXError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"step": result.step, "metrics": dict(result.metrics)}


if __name__ == "__main__":
    work(run)
