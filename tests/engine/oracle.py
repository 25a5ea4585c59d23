"""What the engine must come to: the same training in plain PyTorch, in one process over whole global batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from toy import ToyOptions, ToyStage, collate, sample

from echox.config.schema import Recipe
from echox.engine.lr_schedule import lr_at


def plain_training(
    recipe: Recipe, options: ToyOptions, data_steps: Iterable[int | None]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses after optimizer step k has trained on the data of the k-th of `data_steps`; None: left out."""
    torch.manual_seed(recipe.seed)
    stage, optim = ToyStage(options), recipe.optim
    named = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter],
            "peak": optim.lr.lora if name.startswith("lora") else optim.lr.adapters,
            "weight_decay": optim.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in named.items()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)
    losses = []
    for step, data in enumerate(data_steps):
        if data is None:
            continue
        for group in adam.param_groups:
            group["lr"] = lr_at(step, peak=group["peak"], warmup_steps=2, steps=10, final_ratio=optim.final_lr_ratio)
        terms = stage(collate([sample(data, index, options) for index in range(recipe.data.global_batch)]))
        means = {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}
        loss = means["s2t"] + 0.3 * means["ctc"]
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), optim.clip)
        adam.step()
        losses.append(float(loss.detach()))
    return {name: parameter.detach() for name, parameter in named.items()}, losses
