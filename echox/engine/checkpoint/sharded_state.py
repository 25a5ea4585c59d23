"""Copies the ZeRO-3 slices of what trains to the host, and restores them on any number of ranks.

ZeRO-3 cuts every trainable tensor, flattened, into one slice a rank, all of ceil(elements / world size). A checkpoint
holds each rank's slices of the fp32 weights and of both Adam moments under the tensor's name, so a run of another size
reads the ranges that its own slices cover: nothing is converted, and every bit is the one that was saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.device import usable_gpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from echox.engine.deepspeed_engine import Engine

FP32, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
FOLDER = "zero"


def slices_file(rank: int) -> str:
    """Name of a rank's file inside a checkpoint."""
    return f"{FOLDER}/rank-{rank:05d}.safetensors"


def trainables(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Name and parameter of all that trains."""
    return ((name, parameter) for name, parameter in engine.stage.named_parameters() if parameter.requires_grad)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before it was cut."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass
class HostState:
    """Host copies of this rank's slices, in memory that is allocated once and used for every save.

    Attributes:
        tensors: `<fp32, exp_avg or exp_avg_sq>/<name of the tensor>` to this rank's slice, without padding.
        updates: optimizer steps that were applied; without one there are no moments.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    _flats: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def copy_from(self, engine: Engine, rank: int) -> None:
        """Take the state of the step that was trained last; waits for the device."""
        import torch

        zero = engine.ds.optimizer
        self.tensors, self.updates = {}, applied_updates(engine)
        kinds = (FP32, *MOMENTS) if self.updates else (FP32,)
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            for kind in kinds:
                self._copy(group, kind, _flat(zero, group, kind))
        if usable_gpus():
            torch.cuda.synchronize()  # pinned copies run behind
        for name, parameter in trainables(engine):
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            real = max(0, min(padded, parameter.ds_numel - rank * padded))
            for kind in kinds:
                self.tensors[f"{kind}/{name}"] = self._flats[group, kind].narrow(0, offset, real)

    def _copy(self, group: int, kind: str, flat: Tensor) -> None:
        import torch

        if (group, kind) not in self._flats:
            self._flats[group, kind] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        self._flats[group, kind].copy_(flat.detach(), non_blocking=True)


def applied_updates(engine: Engine) -> int:
    """Optimizer steps that changed weights; fewer than were trained where some were skipped."""
    zero = engine.ds.optimizer
    state = zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[0], {})
    return int(state.get("step", 0))


def put_back(engine: Engine, checkpoint: Path, *, rank: int, saved_ranks: int, updates: int) -> None:
    """Bring this rank's slices to a checkpoint that `saved_ranks` ranks have written, and the weights with them."""
    import torch
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    zero = engine.ds.optimizer
    if updates:
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(updates), device=flat.device),  # where fused AdamW keeps it
                **{kind: torch.zeros_like(flat.data) for kind in MOMENTS},
            }
    else:
        zero.optimizer.state.clear()
    with SavedSlices(checkpoint, saved_ranks) as saved:
        for name, parameter in trainables(engine):
            padded = zero.grad_position[zero.get_param_id(parameter)][2]
            start = rank * padded
            stop = min(start + padded, parameter.ds_numel)

            def mine(kind: str, name: str = name, start: int = start, stop: int = stop, padded: int = padded) -> Tensor:
                found = torch.zeros(padded)
                if stop > start:
                    found[: stop - start] = saved.read(f"{kind}/{name}", start, stop)
                return found

            safe_set_local_fp32_param(parameter, mine(FP32))
            for kind in MOMENTS if updates else ():
                safe_set_local_optimizer_state(parameter, mine(kind), kind)
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero._post_step(set())  # whole copies of small tensors follow their slices


class SavedSlices:
    """Reads ranges of whole tensors out of the slices of all ranks of a checkpoint."""

    def __init__(self, checkpoint: Path, ranks: int) -> None:
        self._checkpoint = checkpoint
        self._ranks = ranks
        self._files: dict[int, Any] = {}

    def __enter__(self) -> SavedSlices:
        from safetensors import safe_open

        # Opening maps the file, so many ranks' files cost no memory.
        for rank in range(self._ranks):
            path = str(self._checkpoint / slices_file(rank))
            self._files[rank] = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.__exit__(*exception)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a flattened tensor."""
        import torch

        parts: list[Tensor] = []
        begin = 0
        for rank in range(self._ranks):
            piece = self._files[rank].get_slice(key)
            end = begin + int(piece.get_shape()[0])
            if end > start and begin < stop:
                parts.append(piece[max(start - begin, 0) : min(stop, end) - begin])
            begin = end
        return torch.cat(parts)

    def whole(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weights of one tensor in the dtype that the model computes in."""
        elements = 1
        for side in shape:
            elements *= side
        return self.read(f"{FP32}/{name}", 0, elements).to(dtype).reshape(shape)


def _flat(zero: Any, group: int, kind: str) -> Tensor:
    flat = zero.fp32_partitioned_groups_flat[group]
    found: Tensor = flat if kind == FP32 else zero.optimizer.state[flat][kind]
    return found
