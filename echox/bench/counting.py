"""Counts what a piece of work asks of the device: FLOP of its matmuls and attention, kernels, and host syncs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_aten: Any = torch.ops.aten
NO_KERNEL = {"aten._unsafe_view.default", "aten.empty.memory_format", "aten.lift_fresh.default"}
SYNCS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}


class Operators(TorchDispatchMode):
    """Counts operators that start a kernel, views apart, and those of them for which the host waits.

    Attributes:
        names: of the operators, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        if str(func) not in NO_KERNEL and (returned is None or returned.is_write):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Operators that computed something."""
        return len(self.names)

    @property
    def syncs(self) -> int:
        """Operators whose result the host read."""
        return sum(name in SYNCS for name in self.names)


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also knows the attention of a CPU; pairs that a causal mask leaves out count too."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(query: Any, key: Any, value: Any, *others: Any, out_shape: Any = None, **named: Any) -> int:
    return 2 * _product(query, key)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *others: Any, out_shape: Any = None, **named: Any
) -> int:
    return 5 * _product(query, key)  # the scores once more, and a gradient of each of the four factors


def _product(query: Any, key: Any) -> int:
    """FLOP of a product of queries `[B, H, S, D]` and keys `[B, K, T, D]`, given as shapes."""
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[2] * width)
