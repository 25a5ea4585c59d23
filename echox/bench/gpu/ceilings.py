"""Measures what a device can do at most: a large matrix product, and a copy within its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
        matmul_tflops: of a large product of random numbers, 1e12 FLOP/s.
        copy_tb_s: bytes read and written, TB/s.
    """

    matmul_tflops: float
    copy_tb_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """In a second or two of a GPU, or of a CPU at a size of its own."""
    gpu = device.type == "cuda"
    size, copied = (8192, 2**32) if gpu else (512, 2**24)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: left @ right, device)
    source = torch.ones(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / product / 1e12, 2 * copied / copy / 1e12)


def _best(work: object, device: torch.device, runs: int = 10) -> float:
    """Mean seconds of a few in a row, after some that warm up."""
    assert callable(work)
    for _ in range(3):
        work()
    synchronize(device)
    before = time.perf_counter()
    for _ in range(runs):
        work()
    synchronize(device)
    return (time.perf_counter() - before) / runs


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
