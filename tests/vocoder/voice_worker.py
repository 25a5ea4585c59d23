"""A process that trains toy vocoders, run after run; `voice_worker.py PLAN`."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from launching import Context, work
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from echox.vocoder.recipe import VoiceRecipe
from echox.vocoder.trainer import train_voice


class Gradients:
    """What each update was given; dies in the place of one of them if it is told to."""

    def __init__(self, die_at: int | None) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self._die_at = die_at

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(self.seen) == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        values = [value for group in optimizer.param_groups for value in group["params"]]
        self.seen[f"{len(self.seen):03d}"] = torch.cat([value.grad.flatten() for value in values])


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    gradients = Gradients(scenario.get("die_at"))
    if context.rank == scenario.get("drained"):
        context.stop_requested = lambda: "a node is taken away"  # type: ignore[method-assign]
    hook = register_optimizer_step_pre_hook(gradients)
    try:
        result = train_voice(VoiceRecipe.model_validate(scenario["recipe"]), context)
    finally:
        hook.remove()
    if context.rank == 0:
        save_file(gradients.seen, result.run_folder / "gradients.safetensors")
    return {"step": result.step, "metrics": dict(result.metrics), "stopped": result.stopped}


if __name__ == "__main__":
    work(run)
