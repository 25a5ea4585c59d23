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

from echox.engine.flat import HOLDER, FlatTrainables, Group, whole
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


def trainable_groups(module: Any) -> list[Group]:
    """Trainable tensors by learning rate, split into matrices, which decay, and vectors, which do not.

    Raises:
        ValueError: a trainable parameter is in no group or in two, or a group names an unknown or frozen one.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    left = set(trainable)
    groups: list[Group] = []
    for rate, names in module.parameter_groups().items():
        wrong = [name for name in names if name not in left]
        if wrong:
            raise ValueError(
                f"parameter group '{rate}' names parameters that are frozen, unknown or grouped twice: {wrong}"
            )
        left.difference_update(names)
        for decays in (True, False):
            chosen = tuple(name for name in names if (trainable[name].dim() > 1) == decays)
            if chosen:  # DeepSpeed fails on an empty group.
                groups.append(Group(rate, decays, chosen))
    if left:
        raise ValueError(f"trainable parameters without a learning rate: {sorted(left)}")
    return groups


def adam_groups(trainables: FlatTrainables, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups, one a flat parameter."""
    return [
        {
            "params": [flat],
            "lr": float(getattr(optim.lr, group.rate)),
            "weight_decay": optim.weight_decay if group.decays else 0.0,
            "rate": group.rate,
        }
        for flat, group in zip(trainables.flats, trainables.groups, strict=True)
    ]


def drop_idle_hooks(offload: Any) -> None:
    """Take ZeRO-3's hooks from modules that own none of its parameters.

    It hooks every module four times, two of which put a node of Python into the graph, and LoRA gives an LLM thousands
    of modules. What trains is gathered by ourselves, and replicated frozen weights by nobody.
    """
    from deepspeed.utils import z3_leaf_module

    needed = {
        id(hooks)
        for module in offload.module.modules()
        if any(True for _ in module.parameters(recurse=z3_leaf_module(module)))
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    }
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) not in needed:
            handle.remove()


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
        trainables: all that trains in it.
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
        for leaf in module.zero_leaf_modules() if hasattr(module, "zero_leaf_modules") else ():
            set_z3_leaf_module(leaf, True)
        self.trainables = FlatTrainables(module, trainable_groups(module), torch.distributed.get_world_size())
        setattr(module, HOLDER, self.trainables)
        groups = adam_groups(self.trainables, recipe.optim)
        adam = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True)
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False
        )
        self.ds, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config, dist_init_required=False)
        self.config = config
        self.precision = precision
        self.stage: Any = self.ds.module
        self._stale = True
        self._hold_whole(device)
        adam.register_step_post_hook(lambda *_: setattr(self, "_stale", True))
        self.stage.register_forward_pre_hook(lambda *_: self.refresh())
        remember_tree(self.stage)
        self._recipe = recipe
        self.invalidations = TraceInvalidations()
        self._offload: Any = getattr(self.ds.optimizer, "parameter_offload", None)
        if self._offload is not None:
            drop_idle_hooks(self._offload)
            self._coordinators: dict[str, Any] = {}
            for purpose in ("evaluation", "probe", "answers"):
                coordinator = self._coordinators[purpose] = copy.copy(self._offload.param_coordinator)
                coordinator._clear_trace_structures()
                if purpose != "answers":  # how many tokens are generated is another number each time
                    self.invalidations.watch(coordinator)
            self.invalidations.watch(self._offload.param_coordinator)

    def _hold_whole(self, device: torch.device) -> None:
        """Give every flat parameter memory for all of it; ZeRO-3 takes it for partitioned and leaves it alone."""
        import torch

        # Small ones would be gathered twice, and into other memory, where the JSON leaves a threshold to DeepSpeed.
        persistent = self.ds.optimizer.persistent_parameters
        persistent[:] = [parameter for parameter in persistent if not parameter.requires_grad]
        for flat in self.trainables.flats:
            flat.ds_persist = False
            flat.data = torch.zeros(flat.ds_numel, dtype=flat.dtype, device=device)
        with torch.no_grad():
            self.refresh()

    def gather(self) -> None:
        """Bring the whole trainables to what the ranks' slices hold."""
        for flat in self.trainables.flats:
            whole(flat, flat.data)
        self._stale = False

    def refresh(self) -> None:
        """Before a forward: gather the trainables if they were updated, and give the modules their views of them."""
        if self._stale:
            self.gather()
        self.trainables.bind()

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
                self.refresh()
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
