"""How a rank's useful FLOP and the time of its parts become metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from echox.engine.hardware import GPUS, known_gpu, peak_flops
from echox.engine.monitor.metrics import step_metrics
from echox.engine.monitor.step_timer import StepTimer
from echox.engine.step import StepSums
from echox.engine.world import World

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name_or_not_at_all(name: str, gpu: str | None) -> None:
    assert known_gpu(name) is (None if gpu is None else GPUS[gpu])


def test_a_peak_is_that_of_half_precision_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA, torch.bfloat16) == 989e12
    assert peak_flops(CUDA, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None


class _Stage(nn.Module):
    """Notes 3 TFLOP a forward and times a part."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 2).to(torch.bfloat16)

    def flops(self, works: list[str]) -> dict[str, float]:
        return {"a": 2e12 * len(works), "b": 1e12 * len(works)}

    def part_seconds(self) -> dict[str, float]:
        return {"teacher": 3.0}


def _metrics(stage: Any, work: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(StepTimer, "read", lambda self: (12.0, 2.0, 0.0))
    engine: Any = SimpleNamespace(
        stage=stage, ds=SimpleNamespace(get_global_grad_norm=lambda: 1.0), invalidations=SimpleNamespace(count=0)
    )
    return step_metrics(engine, StepSums(samples=1, work=work), {}, StepTimer(), World(0, 1, CPU))


def test_useful_flops_of_all_forwards_count_over_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echox.engine.monitor.metrics.peak_flops", lambda device, dtype: 30e12)
    values = _metrics(_Stage(), ["first", "second"], monkeypatch)
    assert values["perf/tflops_per_s_per_gpu"] == pytest.approx(3.0)
    assert values["perf/mfu"] == pytest.approx(0.1)
    assert values["perf/teacher_share"] == pytest.approx(3 / 12)


def test_without_a_known_peak_or_counted_work_there_is_no_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "perf/mfu" not in _metrics(_Stage(), ["one"], monkeypatch)
    alone = _metrics(nn.Linear(2, 2), [], monkeypatch)
    assert not {"perf/mfu", "perf/tflops_per_s_per_gpu", "perf/teacher_share"} & alone.keys()
