"""A process of the layout test: a few Stage III steps of the tiny model in each layout; `layout_worker.py PLAN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from launching import Context, work
from toy import UncountedLoader, toy_recipe

from echox.config.schema import Recipe
from echox.engine.interfaces import StageSetup
from echox.engine.trainer import train
from echox.models import chunked_heads
from echox.models.compiled import compile_pointwise
from echox.stream.batch import SpeechBatch
from tests import tiny
from tests.regions import Regions

STEPS = 4


SPLITS: dict[str, list[list[int]]] = {"whole": [[0, 1, 2, 3]], "2-and-2": [[0, 3], [1, 2]], "1-and-3": [[2], [0, 1, 3]]}


@dataclass
class Loader(UncountedLoader):
    """Two micro-batches a step, of other lengths on each rank; or four samples, split as `SPLITS` says."""

    rank: int
    split: str = ""

    def step(self, step: int) -> list[SpeechBatch]:
        if self.split:
            whole = answered(tiny.speech_batch(4, seed=100 * step + self.rank, step=step))
            return [tiny.rows_of(whole, rows) for rows in SPLITS[self.split]]
        return [
            answered(tiny.speech_batch(3 + self.rank, seed=100 * step + 10 * micro + self.rank, step=step))
            for micro in (0, 1)
        ]


def answered(batch: SpeechBatch) -> SpeechBatch:
    """The batch with own answers of other lengths than the reference, the third of which was rejected."""
    lengths = torch.tensor([7, 3, 0, 6])[: len(batch.ids)]
    batch.own_mask_BR = torch.arange(7) < lengths[:, None]
    batch.own_BR = batch.response_BR[:, :1].repeat(1, 7).masked_fill(~batch.own_mask_BR, 0)
    return batch


@dataclass(frozen=True)
class Build:
    """The injected build function."""

    layout: str
    frozen: Path
    checkpointing: bool = False
    split: str = ""
    pseudo_text: str = "argmax_teacher_forced"
    compiled: bool = False

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        cuts = {"mode": "fixed", "fixed_tokens": 3}
        stage = tiny.echo_stage(layout=self.layout, segmentation=cuts, units_per_token=1, pseudo_text=self.pseudo_text)
        if self.checkpointing:
            stage.s2t.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compiled:
            assert compile_pointwise(stage, Regions()) == (6, 6)
        return StageSetup(
            module=stage,
            train_loader=Loader(rank, self.split),
            valid_loaders={},
            frozen_models={"tower": self.frozen},
        )


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(
        scenario["name"],
        Path(plan["deepspeed"]),
        optim__steps=STEPS,
        data__global_batch=8,
        data__micro_batch={"": 2, "whole": 4}.get(scenario["split"], 2),
        optim__eps=1.0,  # Adam with so large an epsilon follows the gradient, not its sign
        optim__lr={"lora": 1.0, "echo": 1.0, "denoising": 1.0},
        engine__frozen_placement=scenario["placement"],
        engine__validate_every=0,
    )
    options = {name: scenario[name] for name in ("layout", "checkpointing", "split", "pseudo_text", "compiled")}
    build = Build(frozen=Path(plan["frozen"]), **options)
    chunked_heads.CHUNK_ELEMENTS = scenario["chunk"]
    result = train(recipe, context, build)
    return {"moved_frozen": result.moved_frozen, "unmoved": result.unmoved_trainable}


if __name__ == "__main__":
    work(run)
