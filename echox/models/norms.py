"""Computes RMSNorm by torch's own operator, one fused kernel forward and one backward on a GPU, six and more without.

On a CPU torch takes it apart into the operators of the module that it replaces: every bit stays.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.models.mixed import mix_into


def fuse_rms_norms(model: nn.Module) -> int:
    """Let every plain RMSNorm of `model` run fused, and return how many do.

    Plain is x / rms(x) times a weight, with `variance_epsilon` below the root: the norm of Llama and its like. Others,
    such as Gemma's with its weight of 1 + w, stay as they are.
    """
    found = 0
    for module in model.modules():
        kind: Any = type(module)
        if _is_plain(kind):
            mix_into(module, _FusedForward)
            found += 1
    return found


class _FusedForward(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        return F.rms_norm(hidden, list(self.weight.shape), self.weight, self.variance_epsilon)


@cache
def _is_plain(norm: Any) -> bool:
    """Whether modules of a class compute what the operator does, tried on one of them."""
    if not norm.__name__.endswith("RMSNorm") or issubclass(norm, _FusedForward):
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            one: Any = norm(8, eps=0.1)
            if set(dict(one.named_parameters())) != {"weight"} or not hasattr(one, "variance_epsilon"):
                return False
            one.float().weight.copy_(torch.randn(8))
            hidden_Nh = torch.randn(3, 8)
            return torch.allclose(one(hidden_Nh), F.rms_norm(hidden_Nh, (8,), one.weight, 0.1), atol=1e-6)
        except (TypeError, ValueError, RuntimeError):  # made in another way, so of another kind
            return False
