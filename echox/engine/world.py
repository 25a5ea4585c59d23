"""Provides the collectives that the engine needs over the processes of one run, each a no-op in a world of one.

Tensors of training go over the device's own backend. Everything else (paths, hashes, votes) goes over a second group
between the hosts, so that it never waits for a GPU.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from echox.device import DEVICE
from echox.errors import LaunchError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank and size of this process's world, the device its collectives run on, and the group between the hosts."""

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @classmethod
    def of(cls, rank: int, size: int, device: torch.device) -> Self:
        """The world of an initialised torch.distributed; every rank must make it.

        Raises:
            LaunchError: two ranks have one GPU.
        """
        import torch.distributed as dist

        world = cls(rank, size, device, dist.new_group(backend="gloo") if size > 1 else None)
        world._refuse_shared_gpu()
        return world

    def _refuse_shared_gpu(self) -> None:
        """Raise LaunchError on every rank where two have one GPU: NCCL would refuse it, in words of its own."""
        if self.size == 1 or self.device.type != "cuda":
            return
        import torch

        properties = torch.cuda.get_device_properties(self.device)
        gpus = self.all_gather((socket.gethostname(), str(properties.uuid)))
        for rank, gpu in enumerate(gpus):
            if (first := gpus.index(gpu)) != rank:
                raise LaunchError(
                    f"ranks {first} and {rank} have one GPU, {properties.name}, which NCCL does not allow",
                    where=f"{gpu[0]}, GPU {gpu[1]}",
                    fix=f"start one process a GPU of a node, or train on the CPU with {DEVICE}=cpu",
                )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over the ranks, in place; no host sync."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Element-wise logical or over the ranks; a host sync."""
        import torch

        counts = self.all_reduce(torch.tensor(flags, dtype=torch.int64, device=self.device))
        return [bool(count) for count in counts.tolist()]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        if self.size == 1:
            return value
        box: list[T | None] = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return cast(T, box[0])

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        box: list[T] = [value] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_gather(None)
