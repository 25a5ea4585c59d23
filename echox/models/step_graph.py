"""Replays a step of fixed shapes as a CUDA graph: one launch in place of a hundred. Elsewhere the step simply runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


class StepGraph:
    """A step that is called many times: on a GPU the first call runs it, the second captures it, the others replay it.

    Args:
        step: reads and writes tensors that stay where they are, and never waits for the device.
        device: of those tensors.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._place = _place(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        """Do one step; on a GPU it is queued like any other work of the current stream."""
        if self._place is None:
            self._step()
            return
        if self._graph is None:
            self._graph = self._place.run(self._step, capture=self._warm)
            self._warm = True
            if self._graph is None:
                return
        self._graph.replay()


class _Place:
    """The stream on which a device's graphs are captured, and the memory they share, as only one at a time is used."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.CUDAGraph | None = None

    def run(self, step: Callable[[], None], *, capture: bool) -> torch.cuda.CUDAGraph | None:
        """Run a step on the stream of the captures, so that libraries get their workspaces, or capture it there."""
        graph = torch.cuda.CUDAGraph() if capture else None
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if graph is None:
                step()
            else:
                # thread_local: data and NCCL threads go on calling CUDA meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                step()
                graph.capture_end()
                self._last = graph  # without a living graph the shared memory could not be shared any more
        current.wait_stream(self._stream)
        return graph


@cache
def _place(device: torch.device) -> _Place:
    return _Place(device)
