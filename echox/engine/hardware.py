"""Lists the published limits of GPUs, by which a step's utilisation is measured and predicted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Gpu(NamedTuple):
    """Limits of one GPU, from its maker's data sheet.

    Attributes:
        pattern: regular expression of the names that its driver gives it.
        tflops: dense bf16 matrix products, 1e12 FLOP/s.
        memory_gib: what a process finds, GiB.
        memory_tb_s: bandwidth of its memory, TB/s.
        link_gb_s: to the other GPUs of its node, GB/s in each direction.
    """

    pattern: str
    tflops: float
    memory_gib: float
    memory_tb_s: float
    link_gb_s: float


GPUS: dict[str, Gpu] = {
    "b200": Gpu(r"\bB200\b", 2250, 178.0, 8.0, 900),
    "h200": Gpu(r"\bH200(?! NVL)\b", 989, 139.8, 4.8, 450),
    "h100": Gpu(r"\bH100\b(?=.*HBM3)", 989, 79.1, 3.35, 450),
    "h100-pcie": Gpu(r"\bH100 PCIe\b", 756, 79.1, 2.0, 64),
    "a100": Gpu(r"\bA100-SXM\w*-80GB\b", 312, 79.1, 2.04, 300),
    "a100-40gb": Gpu(r"\bA100-SXM\w*-40GB\b", 312, 39.4, 1.56, 300),
    "a100-pcie": Gpu(r"\bA100 80GB PCIe\b|\bA100-PCIE-80GB\b", 312, 79.1, 1.94, 32),
    "l40s": Gpu(r"\bL40S\b", 362, 44.4, 0.86, 32),
    "rtx4090": Gpu(r"\bRTX 4090\b(?! D)", 165, 23.6, 1.01, 32),
}
"""Name on the command line to limits. A part of a GPU (MIG) is none of them."""


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, or None: no number is better than a wrong one."""
    if "MIG" in device_name:
        return None
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that matrix products of `dtype` can reach on the device; None where that is not known."""
    import torch

    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    gpu = known_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.tflops * 1e12
