"""Compiles for tests: a backend that runs graphs as they are, and says how many there are and how often each runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import _disable_current_modes


class Regions:
    """A compiler of functions in place of Inductor, whose graphs no counter of operators sees from within.

    Attributes:
        graphs: how many were made, by direction: forward, backward, or without gradients.
        runs: how often graphs ran, by direction.
        sizes: how many different sizes their results had, summed over runs: at best a kernel each.
    """

    def __init__(self) -> None:
        self.graphs, self.runs, self.sizes = Counter[str](), Counter[str](), 0
        self._backend = aot_autograd(
            fw_compiler=self._maker("forward"),
            bw_compiler=self._maker("backward"),
            inference_compiler=self._maker("without gradients"),
        )

    def __call__(self, function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=self._backend)
        return compiled

    def reset(self) -> None:
        """Count what runs from 0 again."""
        self.runs.clear()
        self.sizes = 0

    def _maker(self, direction: str) -> Callable[..., Any]:
        def make(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            self.graphs[direction] += 1

            def run(*args: Any) -> Any:
                self.runs[direction] += 1
                with _disable_current_modes():
                    found = graph.forward(*args)
                there = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
                made = [out for out in found if isinstance(out, Tensor)]
                self.sizes += len({out.numel() for out in made if out.untyped_storage().data_ptr() not in there})
                return found

            return make_boxed_func(run)

        return make
