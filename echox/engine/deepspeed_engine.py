"""Wraps the DeepSpeed engine of a run: optimizer groups, ZeRO-3, and what we watch or correct about it."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from echox.engine.lr_schedule import rate_at

if TYPE_CHECKING:
    import torch

    from echox.config.schema import OptimConfig, Recipe
    from echox.engine.precision import Resolved


_UNUSED = {
    "deepspeed.autotuning.autotuner": "Autotuner",
    "deepspeed.runtime.zero.muon.muon_optimizer": "MuonWithAuxAdam",
}
"""Modules of DeepSpeed that are replaced by an empty class of this name."""


def prepare_deepspeed(device: torch.device) -> None:
    """Before its first import, tell DeepSpeed what it runs on, and spare it parts that no run uses.

    It would probe for other accelerators; the autotuner brings MLflow and pandas into every rank, and the optimizer
    Muon, which is compiled where it is defined, PyTorch's compiler: seconds of the start. Transformers imports
    DeepSpeed as well, so this comes before both.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    if "deepspeed" not in sys.modules:
        for module_name, name in _UNUSED.items():
            absent = ModuleType(module_name)
            setattr(absent, name, type(name, (), {}))
            sys.modules[module_name] = absent


def parameter_groups(module: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of a stage: one a learning rate, split into tensors that decay and vectors that do not.

    Raises:
        ValueError: a trainable parameter is in no group or in two, or a group names an unknown or frozen one.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    left = set(trainable)
    groups: list[dict[str, Any]] = []
    for rate, names in module.parameter_groups().items():
        wrong = [name for name in names if name not in left]
        if wrong:
            raise ValueError(
                f"parameter group '{rate}' names parameters that are frozen, unknown or grouped twice: {wrong}"
            )
        left.difference_update(names)
        peak = float(getattr(optim.lr, rate))
        for decays in (True, False):
            chosen = [trainable[name] for name in names if (_dimensions(trainable[name]) > 1) == decays]
            if chosen:  # DeepSpeed fails on an empty group.
                decay = optim.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": peak, "weight_decay": decay, "rate": rate})
    if left:
        raise ValueError(f"trainable parameters without a learning rate: {sorted(left)}")
    return groups


def _dimensions(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def leaf_modules(stage: Any) -> list[Any]:
    """Modules whose parameters ZeRO-3 gathers at once: those the stage names, and its transformer layers.

    LoRA makes some fifty modules of a layer, each with hooks and gathers of its own; as one leaf a layer has one of
    either, and the prefetch trace, whose first use costs the square of its length, is short. Three kinds stay as they
    are. A layer with frozen partitions: a frozen weight let go after the forward is not there for the backward through
    it. The first layer of a stack: where its input needs no gradient, PyTorch calls its backward hook, in which
    ZeRO-3 reduces a leaf's gradients, before there are any. A layer of which one backward passes two forwards: the
    hook is called in the midst, when the gradients are those of one of them.
    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = stage.zero_leaf_modules() if hasattr(stage, "zero_leaf_modules") else []
    reused = stage.reused_modules() if hasattr(stage, "reused_modules") else []
    inside = {id(module) for leaf in (*named, *reused) for module in leaf.modules()}
    layers = [
        layer
        for stack in stage.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack[1:]
        if isinstance(layer, GradientCheckpointingLayer)
        and id(layer) not in inside
        and all(parameter.requires_grad for parameter in layer.parameters())
    ]
    return [*named, *layers]


def remember_tree(module: Any) -> None:
    """Let a module answer `modules` and `parameters` from lists instead of walking its tree; the tree may not change.

    ZeRO-3 asks some seven times a micro-step, and LoRA gives an LLM thousands of modules: in a short step on a CPU that
    walk was a quarter of the time.
    """
    modules, parameters = list(module.modules()), list(module.named_parameters())
    walk = module.named_parameters

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        if prefix or not recurse or not remove_duplicate:
            return iter(walk(prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate))
        return iter(parameters)

    module.modules = lambda: iter(modules)
    module.named_parameters = named_parameters
    module.parameters = lambda recurse=True: (parameter for _, parameter in named_parameters(recurse=recurse))


@dataclass
class TraceInvalidations:
    """Counts how often ZeRO-3 threw its prefetch trace away: 0 a step once the order of modules is learnt."""

    count: int = 0

    def watch(self, coordinator: Any) -> None:
        """Count the invalidations of one parameter coordinator."""
        invalidate = coordinator._invalidate_trace

        def counted() -> None:
            self.count += 1
            invalidate()

        coordinator._invalidate_trace = counted


class Engine:
    """A thin owner of `deepspeed.DeepSpeedEngine`: same calls, plus the schedule and the trace counter.

    Attributes:
        ds: DeepSpeed's engine.
        stage: the stage inside it.
        config: the DeepSpeed configuration in force.
        invalidations: counter of prefetch-trace invalidations.
    """

    def __init__(
        self, recipe: Recipe, module: Any, *, device: torch.device, precision: Resolved, config: dict[str, Any]
    ) -> None:
        prepare_deepspeed(device)
        import deepspeed
        import torch
        from deepspeed.utils import set_z3_leaf_module

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Compiled at first start for inference only; a start that is interrupted there leaves a lock on which every
        # later start waits indefinitely.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if list(module.parameters(recurse=False)):
            # ZeRO-3 hooks backward through tensors and tuples alone, so it could not bring these back in time.
            raise ValueError("a stage may not own parameters itself; move them into a submodule that returns tensors")
        for leaf in leaf_modules(module):
            set_z3_leaf_module(leaf, True)
        groups = parameter_groups(module, recipe.optim)
        adam = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True)
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False
        )
        self.ds, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
        self.config = config
        self.precision = precision
        self.stage: Any = self.ds.module
        remember_tree(self.stage)
        self._recipe = recipe
        self.invalidations = TraceInvalidations()
        self._offload: Any = getattr(self.ds.optimizer, "parameter_offload", None)
        if self._offload is not None:
            self._coordinators: dict[str, Any] = {}
            for purpose in ("evaluation", "probe", "answers"):
                coordinator = self._coordinators[purpose] = copy.copy(self._offload.param_coordinator)
                coordinator._clear_trace_structures()
                if purpose != "answers":  # how many tokens are generated is another number each time
                    self.invalidations.watch(coordinator)
            self.invalidations.watch(self._offload.param_coordinator)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set every group's rate for optimizer step `step` (from 0); return them by group."""
        rates: dict[str, float] = {}
        for group in self.ds.optimizer.param_groups:
            group["lr"] = rates[group["rate"]] = rate_at(self._recipe, group["rate"], step)
        return rates

    @contextmanager
    def evaluating(self, purpose: Literal["evaluation", "probe", "answers"] = "evaluation") -> Iterator[None]:
        """Forwards without dropout and without gradients; training goes on afterwards as before.

        ZeRO-3 learns the order of modules of a forward and its backward, and throws what it knows away at the first
        difference. Each kind of forwards alone is therefore followed by a parameter coordinator of its own.

        Args:
            purpose: losses, what a stage measures besides (`probe`), or generated answers.
        """
        import torch

        offload = self._offload
        if offload is not None:
            training, offload.param_coordinator = offload.param_coordinator, self._coordinators[purpose]
            if purpose == "answers" and not offload.param_coordinator.is_invalid_trace():
                # Prefetch would follow the last answers, which had another number of tokens; and what it learns of so
                # many calls takes long.
                offload.param_coordinator._invalidate_trace()
        self.ds.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ds.train()
            if offload is not None:
                offload.param_coordinator = training

    def clear_gradients(self) -> None:
        """Zero ZeRO-3's gradient partitions before the first micro-step of a window.

        DeepSpeed overwrites a partition only when its parameter receives a gradient; a parameter outside this window's
        graph would otherwise step along the gradient it had in an earlier window.
        """
        partitions = getattr(self.ds.optimizer, "grad_partitions_flat_buffer", None)
        if partitions is not None:
            partitions.zero_()

    @property
    def skipped_last_step(self) -> bool:
        """Whether DeepSpeed found the gradient of the last step not to be finite, and left the weights alone.

        It has read the norm of the gradient itself, of all ranks, so asking costs no sync.
        """
        return bool(getattr(self.ds.optimizer, "overflow", False))

    def close(self) -> None:
        """Free what DeepSpeed holds, hooks included."""
        self.ds.destroy()
