"""A process of the stream test: Stage II on real shards, run after run; `stream_worker.py PLAN`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import Context, work
from toy import toy_recipe
from worker import Killed, Scenario

from echox.builders.data import open_sources, train_reader, valid_readers
from echox.config.schema import Recipe
from echox.engine.interfaces import StageSetup
from echox.engine.trainer import train
from echox.errors import EchoXError
from echox.stream.collate import UnitCollate
from tests import tiny


class Witness:
    """A loader that writes down which samples were trained, step by step."""

    def __init__(self, loader: Any, path: Path) -> None:
        self._loader, self._path, self._last = loader, path, (0, [""])
        path.parent.mkdir(parents=True, exist_ok=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def step(self, step: int) -> Sequence[Any]:
        batches: Sequence[Any] = self._loader.step(step)
        self._last = step, [name for batch in batches for name in batch.ids]
        return batches

    def commit(self) -> None:
        self._loader.commit()
        with self._path.open("a") as file:
            file.write(json.dumps(self._last) + "\n")


@dataclass(frozen=True)
class Build:
    """The injected build function: what `echox.builders.setup` does, around a tiny Stage II."""

    frozen: Path
    witness: Path | None = None

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        collate = UnitCollate(lambda text: [12 + ord(c) % 30 for c in text], tiny.Words(lambda units: units % 9))
        train_sources, valid_sources = (open_sources(recipe, each) for each in (recipe.data.train, recipe.data.valid))
        loader: Any = train_reader(recipe, train_sources, collate, rank, world_size)
        if self.witness is not None:
            loader = Witness(loader, self.witness / f"rank-{rank}.jsonl")
        return StageSetup(
            module=tiny.t2c_stage(),
            train_loader=loader,
            valid_loaders=valid_readers(recipe, valid_sources, collate, rank, world_size),
            frozen_models={"tower": self.frozen},
        )


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **scenario["recipe"])
    try:
        result = train(
            recipe,
            Scenario(context, scenario.get("die_at")),
            Build(Path(plan["frozen"]), Path(plan["storage"]) / recipe.name / "seen"),
            accept_new_data=scenario.get("accept", False),
        )
    except Killed:
        return {"killed": True}
    except EchoXError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"step": result.step, "metrics": dict(result.metrics)}


if __name__ == "__main__":
    work(run)
