"""Rotary frequencies survive a cast to bf16, of the decoders and of the LLM."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests import tiny


@pytest.mark.parametrize("model", [tiny.t2c_decoder, tiny.s2t_model])
def test_a_model_in_bf16_turns_as_far_as_one_in_float64(model: Callable[[], nn.Module]) -> None:
    cast = copy.deepcopy(model()).to(torch.bfloat16).bfloat16()
    assert {weight.dtype for weight in cast.parameters() if weight.is_floating_point()} == {torch.bfloat16}
    rotaries = [module for module in cast.modules() if hasattr(module, "inv_freq")]
    assert rotaries
    for rotary in rotaries:
        assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
        cos, sin = rotary(torch.zeros(1, 1), torch.tensor([[600]]))  # what it turns is float32: no rounding at the end
        size = 2 * len(rotary.inv_freq)
        angles = 600.0 / rotary.config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
        for found, exact in ((cos, angles.cos()), (sin, angles.sin())):
            torch.testing.assert_close(found[0, 0].double(), exact.repeat(2), rtol=0, atol=1e-3)
