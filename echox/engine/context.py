"""Provides a train function with its run context: one process, torchrun or, in `launch`, a Ray Train worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from echox.device import usable_gpus
from echox.errors import LaunchError

if TYPE_CHECKING:
    import torch


class RunContext(Protocol):
    """What the train function may know of its launcher; torch.distributed is initialised when it is handed over."""

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def local_rank(self) -> int:
        """Rank on this node; also the index of the process's GPU."""
        ...

    @property
    def storage(self) -> Path:
        """Absolute folder of runs, the same for every process; the run lies in `storage / recipe.name`."""
        ...

    @property
    def checkpoint_in(self) -> Path | None:
        """Checkpoint the launcher asks to continue from, if it keeps track of one."""
        ...

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None) -> None:
        """Tell the launcher of metrics and, if given, a checkpoint that is complete. Every rank calls it."""
        ...

    def stop_requested(self) -> str | None:
        """Why the launcher asks this process to stop, or None; cheap, from any thread, and never a collective."""
        ...


def device_of(context: RunContext) -> torch.device:
    """The device this process trains on: its GPU where it may use one (also made current), else the CPU."""
    import torch

    gpus = usable_gpus()
    if not gpus:
        return torch.device("cpu")
    index = context.local_rank % gpus
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


class LocalContext:
    """One process that is the whole world; DeepSpeed still wants a process group, so it makes one of size 1."""

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, storage: Path | str, *, checkpoint_in: Path | None = None) -> None:
        self.storage = Path(storage).resolve()
        self.checkpoint_in = checkpoint_in
        _announce(rank=0, world_size=1, local_rank=0)

    def __enter__(self) -> Self:
        import torch.distributed as dist

        if not dist.is_initialized():
            device_of(self)
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _close()

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None) -> None:
        """Do nothing: there is no launcher to report to."""

    def stop_requested(self) -> str | None:
        """None: a stop is requested by signals and the run's folder alone."""
        return None


class TorchrunContext:
    """A process started by torchrun: its place comes from the environment."""

    def __init__(self, storage: Path | str, *, timeout_s: int = 1800, checkpoint_in: Path | None = None) -> None:
        try:
            self.rank, self.world_size, self.local_rank = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            )
        except (KeyError, ValueError) as error:
            raise LaunchError(
                f"this process was not started by torchrun: {error}",
                fix="start it as `torchrun --nproc-per-node N -m echox train RECIPE`, or without torchrun's variables",
            ) from None
        self.storage = Path(storage).resolve()
        self.checkpoint_in = checkpoint_in
        self._timeout = timedelta(seconds=timeout_s)

    @staticmethod
    def detected() -> bool:
        """Whether torchrun started this process."""
        return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()

    def __enter__(self) -> Self:
        import torch.distributed as dist

        if not dist.is_initialized():
            device_of(self)
            dist.init_process_group(_backend(), timeout=self._timeout)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _close()

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None) -> None:
        """Do nothing: torchrun restarts a run from what its folder holds."""

    def stop_requested(self) -> str | None:
        """None: a stop is requested by signals and the run's folder alone."""
        return None


def _announce(*, rank: int, world_size: int, local_rank: int) -> None:
    """Set the variables DeepSpeed reads even when the process group exists."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))


def _backend() -> str:
    return "nccl" if usable_gpus() else "gloo"


def _close() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
