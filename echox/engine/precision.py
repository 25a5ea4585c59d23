"""Resolves the number format a run computes in, and counts the formats it ended up with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from echox.device import usable_gpus

if TYPE_CHECKING:
    import torch
    from torch import nn

    from echox.config.schema import Precision

Resolved = Literal["bf16", "fp32"]

_BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def resolve_precision(requested: Precision) -> Resolved:
    """Turn `auto` into bf16 where the hardware multiplies it, else fp32; an explicit choice stands.

    A CPU without bf16 instructions converts every product: a matrix product is then some 40 times slower than in fp32.
    """
    import torch

    if requested != "auto":
        return requested
    if usable_gpus():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_flags() & _BF16_CPU_FLAGS else "fp32"


def torch_dtype(precision: Resolved) -> torch.dtype:
    """The torch dtype of a resolved precision."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def dtype_census(module: nn.Module, frozen_buffers: frozenset[str] = frozenset()) -> dict[str, dict[str, int]]:
    """Elements by kind (`trainable`, `frozen`, `buffer`) and dtype; shared tensors count once.

    Args:
        module: the stage, before or after ZeRO-3 has partitioned it.
        frozen_buffers: names of buffers that hold replicated frozen weights; they count as `frozen`.
    """
    census: dict[str, dict[str, int]] = {"trainable": {}, "frozen": {}, "buffer": {}}
    for _, parameter in module.named_parameters():
        kind = "trainable" if parameter.requires_grad else "frozen"
        _count(census[kind], str(parameter.dtype), int(getattr(parameter, "ds_numel", parameter.numel())))
    for name, buffer in module.named_buffers():
        _count(census["frozen" if name in frozen_buffers else "buffer"], str(buffer.dtype), buffer.numel())
    return census


def _count(of: dict[str, int], dtype: str, elements: int) -> None:
    of[dtype] = of.get(dtype, 0) + elements


def _cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them; empty where the kernel does not tell."""
    if not os.path.exists("/proc/cpuinfo"):
        return frozenset()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
