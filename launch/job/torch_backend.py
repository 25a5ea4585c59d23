"""Joins the workers into a torch process group. Only workers import torch for it.

Ray's own `TorchConfig` does the same and imports torch in the driver and in Ray Train's controller as well, which never
compute anything: seconds of every start, one after the other, and a gigabyte of memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

_LEAVE_TIMEOUT_S = 30


@dataclass
class TorchGroup(BackendConfig):
    """How the workers are joined.

    Attributes:
        backend: of `torch.distributed`: nccl or gloo.
        timeout_s: seconds after which a collective fails.
        defaults: variables of a worker whose node has none of the name; set before NCCL and Gloo read theirs.
    """

    backend: str
    timeout_s: int
    defaults: dict[str, str]

    @property
    def backend_cls(self) -> type[Backend]:
        """What joins them."""
        return _Joining

    @property
    def framework(self) -> TrainingFramework:
        """For Ray's own records."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own records."""
        return asdict(self)


class _Joining(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join all workers at an address of rank 0; blocks until they are."""
        address, port = worker_group.execute_single(0, _address)
        world = {"address": address, "port": port, "world_size": len(worker_group), **asdict(backend_config)}
        joins = [
            worker_group.execute_single_async(rank, _join, world_rank=rank, **world)
            for rank in range(len(worker_group))
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the group; a worker that no longer answers is left alone."""
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=_LEAVE_TIMEOUT_S)


def _address() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _join(
    *,
    address: str,
    port: int,
    world_rank: int,
    world_size: int,
    backend: str,
    timeout_s: int,
    defaults: Mapping[str, str],
) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from datetime import timedelta

    import torch.distributed

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    torch.distributed.init_process_group(
        backend, rank=world_rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
