"""RMSNorms that run fused compute what those of transformers do, and others are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from echox.models.norms import fuse_rms_norms


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Qwen2RMSNorm])
def test_fused_norms_are_transformers_own_with_gradients(norm: Any) -> None:
    own = norm(32, eps=1e-3)
    nn.init.normal_(own.weight)
    fused = copy.deepcopy(own)
    state = torch.random.get_rng_state()
    assert fuse_rms_norms(nn.ModuleList([nn.LayerNorm(4), fused])) == 1
    assert torch.equal(state, torch.random.get_rng_state()), "no random number is drawn"
    assert isinstance(fused, norm) and type(fused).__name__ == norm.__name__ and type(fused) is not norm
    assert fused.state_dict().keys() == own.state_dict().keys()
    found = []
    for module in (own, fused):
        hidden = torch.linspace(-2, 3, 96).view(3, 32).requires_grad_()
        out = module(hidden)
        (out * torch.linspace(0, 1, 96).view(3, 32)).sum().backward()
        found.append((out, hidden.grad, module.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert fuse_rms_norms(fused) == 0, "once is enough"


def test_norms_of_another_kind_stay() -> None:
    class OtherRMSNorm(nn.Module):
        """Without a weight."""

        def __init__(self, width: int, eps: float) -> None:
            super().__init__()
            self.variance_epsilon = eps

    class HalfRMSNorm(LlamaRMSNorm):
        """Computes something else under the same names."""

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            half: torch.Tensor = super().forward(hidden_states) / 2
            return half

    others = nn.ModuleList([Gemma2RMSNorm(8), OtherRMSNorm(8, 0.1), HalfRMSNorm(8), nn.LayerNorm(8)])
    before = [type(module) for module in others]
    assert fuse_rms_norms(others) == 0 and [type(module) for module in others] == before
