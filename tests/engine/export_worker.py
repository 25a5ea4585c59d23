"""A process of the export test: trains the tiny models on disk for a few steps; `export_worker.py PLAN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import Context, work
from toy import UncountedLoader

from echox.builders.setup import TextTools, build_stage, frozen_models
from echox.config.schema import Recipe
from echox.engine.interfaces import StageSetup
from echox.engine.trainer import train
from echox.stream.batch import SpeechBatch
from tests import tiny
from tests.builders import tiny_run


@dataclass
class Loader(UncountedLoader):
    """One micro-batch a step and rank."""

    rank: int

    def step(self, step: int) -> list[SpeechBatch]:
        return [tiny.speech_batch(2, seed=10 * step + self.rank, step=step)]


def build(recipe: Recipe, rank: int, world_size: int) -> StageSetup:
    """The recipe's own stage, on made-up batches."""
    return StageSetup(
        module=build_stage(recipe, TextTools.load(recipe)),
        train_loader=Loader(rank),
        valid_loaders={},
        frozen_models=frozen_models(recipe),
    )


def recipe_for(folder: Path, deepspeed: str, scenario: dict[str, Any]) -> Recipe:
    """Three steps of a stage, with a rate that moves LoRA far."""
    made = tiny_run.make_recipe(
        folder, scenario["stage"], init=scenario["init"], echo={"pseudo_text": "argmax_teacher_forced"}
    )
    content = made.model_dump(mode="json")
    content |= {"name": scenario["name"], "seed": 5}
    content["optim"] |= {"steps": 3, "warmup_steps": 0, "lr": dict.fromkeys(scenario["groups"], 0.05)}
    content["engine"] |= {"deepspeed": deepspeed, "validate_every": 0}
    content["data"] |= {"global_batch": 4, "micro_batch": 2}
    return Recipe.model_validate(content)


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = recipe_for(Path(scenario["models"]), plan["deepspeed"], scenario)
    result = train(recipe, context, build)
    return {"moved_frozen": result.moved_frozen, "unmoved": result.unmoved_trainable}


if __name__ == "__main__":
    work(run)
