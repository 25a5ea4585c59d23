"""Keeps rotary frequencies in float32 when a model is cast to bf16: rounded, they turn 0.26 rad off at position 600."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from echox.models.mixed import mix_into


def keep_rotary_float32(model: nn.Module) -> None:
    """Let every module of `model` with a buffer `inv_freq` keep its buffers in float32, wherever the model is moved.

    Whoever casts the whole model (`Module.to`, DeepSpeed's bf16 mode) would else round them with its weights.
    """
    for module in model.modules():
        if "inv_freq" in module._buffers:
            mix_into(module, _Float32Buffers)


class _Float32Buffers(nn.Module):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and before.dtype == torch.float32 != after.dtype:
                self._buffers[name] = before.to(after.device)
        return found
