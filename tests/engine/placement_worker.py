"""A process of the placement test: steps of the toy, and the bytes that it gathered; `placement_worker.py PLAN`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import Context, work
from toy import ToyBuild, ToyOptions, ToyStage, toy_recipe

from echox.engine import placement
from echox.engine.trainer import train


class Gathers:
    """Counts what DeepSpeed and the engine gather, by the number of ranks that take part, between two forwards."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[int]]] = []

    def begin(self) -> None:
        self.steps.append({})

    def watch(self) -> None:
        import deepspeed.comm.comm as comm

        gather = comm.cdb.all_gather_into_tensor

        def counted(output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, **more: Any) -> Any:
            found = self.steps[-1].setdefault(str(dist.get_world_size(group)), [0, 0])
            found[0] += 1
            found[1] += output_tensor.numel() * output_tensor.element_size()
            return gather(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **more)

        comm.cdb.all_gather_into_tensor = counted


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    folder = Path(plan["deepspeed"]).parent
    if scenario.get("hosts"):
        # Ranks of one machine that say they are on several.
        own = scenario["hosts"][context.rank]
        placement.socket.gethostname = lambda: own  # type: ignore[attr-defined]
    recipe = toy_recipe(
        scenario["name"],
        folder / "ds-small.json",
        engine__frozen_placement=scenario["placement"],
        engine__validate_every=0,
        data__micro_batch=2,
        optim__steps=6,
    )
    gathers = Gathers()

    def pre(stage: ToyStage, *_: Any) -> None:
        if len(gathers.steps) == 0:
            gathers.watch()
        gathers.begin()

    class Build(ToyBuild):
        def __call__(self, recipe: Any, rank: int, world_size: int) -> Any:
            setup = super().__call__(recipe, rank, world_size)
            setup.module.register_forward_pre_hook(pre)
            return setup

    train(recipe, context, Build(ToyOptions(), Path(plan["frozen"])))
    return {"steps": gathers.steps}


if __name__ == "__main__":
    work(run)
