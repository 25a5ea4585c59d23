"""Samples CPU, memory and GPU memory of one node beside training."""

from __future__ import annotations

import sys
import threading
from typing import Protocol

import psutil

GIB = 2.0**30


class MetricsSink(Protocol):
    """The one method of a tracker that the sampler needs."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics."""
        ...


def sample(node: str | None = None) -> dict[str, float]:
    """One reading of this machine, under the names of MLflow's own system metrics so that its page shows them.

    Args:
        node: part of the name when several nodes write to one run; None with a single node.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": (memory.total - memory.available) / 1e6,
        "disk_usage_percentage": disk.percent,
        "process_memory_gib": psutil.Process().memory_info().rss / GIB,
    }
    values |= _gpu_memory()
    prefix = f"system/{node}/" if node else "system/"
    return {prefix + name: float(value) for name, value in values.items()}


def _gpu_memory() -> dict[str, float]:
    """Used memory of each visible GPU, megabytes; empty where torch is not loaded or sees no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    used: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        used[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
    return used


class SystemMetrics:
    """A thread that sends one sample every `interval_s` seconds until closed."""

    def __init__(self, sink: MetricsSink, *, node: str | None = None, interval_s: float = 10.0) -> None:
        self._sink = sink
        self._node = node
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        psutil.cpu_percent()  # the first call only sets the reference point
        self._thread.start()

    def _run(self) -> None:
        step = 0
        while not self._stop.wait(self._interval_s if step else min(1.0, self._interval_s)):
            self._sink.log_metrics(sample(self._node), step)
            step += 1

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=5)
