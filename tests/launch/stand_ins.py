"""Stand-ins for the engine and the stages, so that the launch path is tested without a model. Run in Ray workers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from echox.errors import DataError


def setup(recipe: Any, rank: int, world_size: int) -> str:
    return f"{recipe.stage} {rank}/{world_size}"


def train(recipe: Any, context: Any, build: Any, tracker: Any, *, accept_new_data: bool = False) -> None:
    """All-reduce the ranks, write a checkpoint folder and a metric, as the engine would."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    run = context.storage / recipe.name
    checkpoint = run / "checkpoints" / "step-00000001"
    if context.rank == 0:
        checkpoint.mkdir(parents=True, exist_ok=True)
        seen = {
            "setup": build(recipe, context.rank, context.world_size),
            "total": total.item(),
            "world": context.world_size,
            "cwd": str(Path.cwd()),
            "accelerator": os.environ.get("DS_ACCELERATOR"),
            "nccl": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"),
            "cache": os.environ.get("ECHOX_CACHE"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "checkpoint_in": str(context.checkpoint_in),
            "steps": recipe.optim.steps,
        }
        (run / "seen.json").write_text(json.dumps(seen))
    tracker.log_metrics({"loss/total": total.item()}, 1)
    dist.barrier()
    context.report({"loss/total": total.item()}, checkpoint)


def train_then_wait(recipe: Any, context: Any, build: Any, tracker: Any, *, accept_new_data: bool = False) -> None:
    train(recipe, context, build, tracker)
    if context.rank == 0:
        (context.storage / recipe.name / "waiting").touch()
    time.sleep(600)


def train_bad_data(recipe: Any, context: Any, build: Any, tracker: Any, *, accept_new_data: bool = False) -> None:
    if context.rank == 1:
        raise DataError("shard-000000.tar ends in the middle of a sample", where="sqa-train", fix="build it again")
    time.sleep(600)
