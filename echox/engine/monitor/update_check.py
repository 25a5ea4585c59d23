"""Checks that training moved every trainable tensor and no frozen one, by cheap fingerprints that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echox.engine.flat import pieces

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from echox.engine.world import World

_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """Names of trainable tensors that did not learn, and of frozen tensors that changed."""

    unmoved_trainable: tuple[str, ...]
    moved_frozen: tuple[str, ...]


class UpdateCheck:
    """Fingerprints every tensor when made; `compare` tells what changed since.

    Each rank looks at the shards it owns (fp32 masters of trainables, partitions or replicas of frozen weights), so
    nothing is gathered; the verdicts meet in one small all-reduce. A trainable tensor counts as moved when its weights
    changed *and* its second Adam moment is non-zero: weight decay alone also changes weights.
    """

    def __init__(self, engine: Any, frozen_buffers: frozenset[str], world: World) -> None:
        self._engine = engine
        self._world = world
        self._frozen_buffers = frozen_buffers
        self._before = self._fingerprints()

    def compare(self) -> UpdateReport:
        """Compare with the start; every rank must call it and gets the same answer. A host sync."""
        after = self._fingerprints()
        trainable, frozen = sorted(self._before[0]), sorted(self._before[1])
        learned = self._learned()
        moved = self._world.any_of(
            [self._before[0][name] != after[0][name] and learned[name] for name in trainable]
            + [self._before[1][name] != after[1][name] for name in frozen]
        )
        return UpdateReport(
            unmoved_trainable=tuple(name for name, flag in zip(trainable, moved, strict=False) if not flag),
            moved_frozen=tuple(name for name, flag in zip(frozen, moved[len(trainable) :], strict=True) if flag),
        )

    def _fingerprints(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        from deepspeed.utils import safe_get_local_fp32_param

        trainable = {name: fingerprint(part) for name, part in self._parts(safe_get_local_fp32_param)}
        frozen: dict[str, tuple[int, int]] = {}
        for name, parameter in self._engine.stage.named_parameters():
            if not parameter.requires_grad:
                frozen[name] = fingerprint(parameter.ds_tensor)
        for name, buffer in self._engine.stage.named_buffers():
            if name in self._frozen_buffers:
                frozen[name] = fingerprint(buffer)
        return trainable, frozen

    def _learned(self) -> dict[str, bool]:
        """Whether this rank's part of a trainable ever had a gradient."""
        from deepspeed.utils import safe_get_local_optimizer_state

        found = self._parts(lambda flat: safe_get_local_optimizer_state(flat, "exp_avg_sq"))
        return {name: part is not None and bool(part.count_nonzero()) for name, part in found}

    def _parts(self, of: Callable[[Any], Tensor | None]) -> Iterator[tuple[str, Any]]:
        """This rank's part of every trainable tensor, from its slices of the flat parameters."""
        trainables, world = self._engine.trainables, self._world
        slices = [of(flat) for flat in trainables.flats]
        for piece in pieces(trainables, world.rank, world.size):
            mine = slices[piece.place.flat]
            yield piece.place.name, None if mine is None else mine.narrow(0, piece.offset, piece.stop - piece.start)


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two integers that change when any bit of the tensor does, or two bits swap places; order-independent sums.

    Sums wrap around in 64 bits: exact and equal on every run, unlike sums of floats.
    """
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_integer_of(flat.element_size())) if flat.is_floating_point() else flat
    plain = torch.zeros((), dtype=torch.int64, device=flat.device)
    placed = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        # Odd multipliers are invertible modulo 2^64, so a single changed element always shows.
        position = torch.arange(start, start + part.numel(), device=part.device) * 2 + 1
        plain += part.sum()
        placed += (part * position).sum()
    return int(plain), int(placed)


def _integer_of(bytes_: int) -> torch.dtype:
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bytes_]
