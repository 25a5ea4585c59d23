"""One function decides about the device: what is visible, what the environment says, what the recipe has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echox import device
from echox.config.load import load_recipe
from echox.engine import context, precision
from echox.engine.world import World
from echox.errors import LaunchError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, as far as torch says; the indices that were made current."""
    current: list[int] = []
    monkeypatch.delenv(device.DEVICE, raising=False)
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "is_bf16_supported": lambda including_emulation=True: True,
        "set_device": current.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return current


def rank(local_rank: int) -> Any:
    return SimpleNamespace(rank=local_rank, world_size=4, local_rank=local_rank)


def test_a_gpu_that_is_visible_is_used(two_gpus: list[int]) -> None:
    assert (device.usable_gpus(), device.best_device(), context._backend()) == (2, "cuda", "nccl")
    assert context.device_of(rank(1)) == torch.device("cuda", 1) and two_gpus == [1]
    assert precision.resolve_precision("auto") == "bf16"


def test_the_cpu_is_used_where_the_environment_says_so(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.DEVICE, "cpu")
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert (device.usable_gpus(), device.best_device(), context._backend()) == (0, "cpu", "gloo")
    assert context.device_of(rank(1)) == torch.device("cpu") and two_gpus == []
    assert precision.resolve_precision("auto") == "fp32"


def test_a_recipe_without_gpus_computes_on_the_cpu_unless_the_environment_names_a_device() -> None:
    demo, on_gpu = load_recipe("demo/s2t"), load_recipe("demo/s2t", ["scaling.gpus_per_worker=1"])
    for recipe, before, after in (
        (demo, {}, {device.DEVICE: "cpu"}),
        (demo, {device.DEVICE: "cuda"}, {device.DEVICE: "cuda"}),
        (on_gpu, {}, {}),
    ):
        environment = dict(before)
        device.follow_recipe(recipe, environment)
        assert environment == after


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(device.DEVICE, "cuda")
    with pytest.raises(LaunchError, match="torch sees no GPU"):
        device.usable_gpus()
    monkeypatch.setenv(device.DEVICE, "tpu")
    with pytest.raises(LaunchError, match="ECHOX_DEVICE=tpu names no device"):
        device.usable_gpus()


def test_two_ranks_on_one_gpu_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H200", uuid="gpu-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    apart, shared = [("a", "gpu-0"), ("a", "gpu-1"), ("b", "gpu-1")], [("a", "gpu-0"), ("a", "gpu-1"), ("a", "gpu-1")]
    world = World(2, 3, torch.device("cuda", 0))
    monkeypatch.setattr(World, "all_gather", lambda self, value: apart)
    world._refuse_shared_gpu()
    monkeypatch.setattr(World, "all_gather", lambda self, value: shared)
    with pytest.raises(LaunchError, match="ranks 1 and 2 have one GPU, H200") as caught:
        world._refuse_shared_gpu()
    assert caught.value.where == "a, GPU gpu-1" and "one process a GPU" in str(caught.value.fix)
    World(2, 3, torch.device("cpu"))._refuse_shared_gpu()
