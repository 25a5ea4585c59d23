"""Implements the engine's run context inside a Ray Train worker."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

POINTER = "checkpoint.json"
DRAINED = "a node of this run is being taken away"
"""How the reason begins when Ray has announced the loss of a node."""


class RayContext:
    """Rank and storage from Ray Train; Ray has made the process group before the train function runs.

    Ray is told of a checkpoint by a pointer file: the checkpoint itself is already complete in shared storage, and a
    second copy under Ray's management could disagree with it.
    """

    def __init__(self, storage: Path) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        self.node_rank: int = context.get_node_rank()
        self.local_world_size: int = context.get_local_world_size()
        self.storage = storage

    @property
    def checkpoint_in(self) -> Path | None:
        """The last checkpoint reported in this job, after a restart of its workers; None in a new job."""
        import ray.train

        reported = ray.train.get_checkpoint()
        if reported is None:
            return None
        with reported.as_directory() as folder:
            path = Path(json.loads((Path(folder) / POINTER).read_text())["path"])
        return path if path.is_dir() else None

    def stop_requested(self) -> str | None:
        """Why this process should stop: a node that hosts one of the ranks is being drained.

        Ray's `get_preemption_info` is a barrier of all ranks. Its watcher hands every worker what it knows, and that is
        read here: the memory of this process, nothing else.
        """
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is None:
            return None
        nodes = ", ".join(node[:12] for node in info.preempted_node_ids)
        return f"{DRAINED}: {nodes}"

    def report(self, metrics: Mapping[str, float], checkpoint_dir: Path | None) -> None:
        """Tell Ray of metrics and a complete checkpoint. A barrier: every rank calls it as often as the others."""
        import ray.train

        plain = {key: float(value) for key, value in metrics.items()}
        if checkpoint_dir is None or self.rank != 0:
            ray.train.report(plain)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"path": str(checkpoint_dir)}))
            ray.train.report(plain, checkpoint=ray.train.Checkpoint.from_directory(folder))
