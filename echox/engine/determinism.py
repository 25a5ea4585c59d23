"""Makes a GPU give the same bits from the same start, where the recipe asks for it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = ":4096:8"


def compute_deterministically(
    wanted: bool, device: torch.device, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let torch use only algorithms that add in a fixed order, before anything was multiplied on `device`.

    Attention's backward then keeps an order (flash and memory-efficient attention ask torch's own switch), gathers and
    scatters sort, cuBLAS gets workspaces of its own, and the CTC loss, whose gradient has no such kernel, goes to the
    CPU (`echox/stages/losses.py`). Whatever else has none raises a RuntimeError by its name. On a CPU nothing changes:
    what runs there has one order.

    Args:
        wanted: the recipe's `engine.deterministic`.
        device: that the process computes on.
        environment: where cuBLAS reads how to work; a value that is there stands.
    """
    if not wanted or device.type != "cuda":
        return
    import torch

    environment.setdefault(WORKSPACE, _FIXED)
    torch.use_deterministic_algorithms(True)
    switches: Any = torch.utils.deterministic  # torch does not declare what is in it
    switches.fill_uninitialized_memory = False  # nothing here reads what it did not write
    torch.backends.cudnn.benchmark = False
