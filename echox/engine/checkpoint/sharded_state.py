"""Copies the ZeRO-3 slices of what trains to the host, and restores them on any number of ranks.

ZeRO-3 cuts every flat parameter (`echox/engine/flat.py`) into one slice a rank. A checkpoint holds, under the name of
every trainable tensor, each rank's part of its fp32 weights and of both Adam moments, one behind the other in the order
of the ranks and empty where a rank has none. So a run of another size, or one that lays the tensors out in another way,
reads the ranges that its own slices cover: nothing is converted, and every bit is the one that was saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.device import usable_gpus
from echox.engine.flat import pieces

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from echox.engine.deepspeed_engine import Engine

FP32, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
FOLDER = "zero"


def slices_file(rank: int) -> str:
    """Name of a rank's file inside a checkpoint."""
    return f"{FOLDER}/rank-{rank:05d}.safetensors"


@dataclass
class HostState:
    """Host copies of this rank's slices, in memory that is allocated once and used for every save.

    Attributes:
        tensors: `<fp32, exp_avg or exp_avg_sq>/<name of the tensor>` to this rank's part of it.
        updates: optimizer steps that were applied; without one there are no moments.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    _flats: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def copy_from(self, engine: Engine, rank: int, ranks: int) -> None:
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
        at = _positions(engine)
        for piece in pieces(engine.trainables, rank, ranks):
            group, begin = at[piece.place.flat]
            for kind in kinds:
                part = self._flats[group, kind].narrow(0, begin + piece.offset, piece.stop - piece.start)
                self.tensors[f"{kind}/{piece.place.name}"] = part

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


def put_back(engine: Engine, checkpoint: Path, *, rank: int, ranks: int, saved_ranks: int, updates: int) -> None:
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
    kinds = (FP32, *MOMENTS) if updates else (FP32,)
    flats = engine.trainables.flats
    with SavedSlices(checkpoint, saved_ranks) as saved:
        mine = {
            (number, kind): torch.zeros(flat.ds_numel // ranks) for number, flat in enumerate(flats) for kind in kinds
        }
        for piece in pieces(engine.trainables, rank, ranks):
            if piece.stop > piece.start:
                for kind in kinds:
                    part = mine[piece.place.flat, kind].narrow(0, piece.offset, piece.stop - piece.start)
                    part.copy_(saved.read(f"{kind}/{piece.place.name}", piece.start, piece.stop))
    for (number, kind), values in mine.items():
        if kind == FP32:
            safe_set_local_fp32_param(flats[number], values)
        else:
            safe_set_local_optimizer_state(flats[number], values, kind)
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero._post_step(set())  # whole copies of small frozen tensors
    engine.gather()


def _positions(engine: Engine) -> list[tuple[int, int]]:
    """Group of ZeRO-3 and first element there of this rank's slice of every flat parameter."""
    zero = engine.ds.optimizer
    return [tuple(zero.grad_position[zero.get_param_id(flat)][:2]) for flat in engine.trainables.flats]


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
