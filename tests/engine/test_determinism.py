"""`engine.deterministic` switches torch before the device computes; on a CPU, or not asked for, it touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from echox.config.load import load_recipe
from echox.engine import trainer
from echox.engine.determinism import WORKSPACE, compute_deterministically
from echox.stages import losses


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("wanted", "device"), [(False, "cuda"), (True, "cpu")])
def test_nothing_changes_on_a_cpu_or_unasked(wanted: bool, device: str) -> None:
    environment: dict[str, str] = {}
    compute_deterministically(wanted, torch.device(device), environment)
    assert not torch.are_deterministic_algorithms_enabled() and environment == {}


def test_a_gpu_adds_in_a_fixed_order_from_its_first_product_on() -> None:
    environment: dict[str, str] = {}
    compute_deterministically(True, torch.device("cuda", 0), environment)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert environment == {WORKSPACE: ":4096:8"}
    compute_deterministically(True, torch.device("cuda", 0), environment := {WORKSPACE: ":16:8"})
    assert environment == {WORKSPACE: ":16:8"}


def test_the_recipe_decides_before_the_world_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Stop(Exception):
        pass

    def world_of(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(trainer, "compute_deterministically", lambda *args: asked.append(args))
    monkeypatch.setattr(trainer, "device_of", lambda context: "the device")
    monkeypatch.setattr(trainer.World, "of", world_of)
    for value in ("true", "false"):
        with pytest.raises(Stop):
            trainer.train(load_recipe("demo/t2c", [f"engine.deterministic={value}"]), _Context(), lambda *_: None)  # type: ignore[arg-type]
    assert asked == [(True, "the device"), (False, "the device")]


class _Context:
    rank = local_rank = 0
    world_size = 1


def test_ctc_on_a_gpu_goes_to_the_cpu_where_order_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        """A tensor that says it is on a GPU until it is brought here."""

        device = torch.device("cuda", 0)

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> torch.Tensor:
            return self.tensor

    given = [
        OnGpu(torch.randn(7, 2, 4).log_softmax(-1)),
        OnGpu(torch.tensor([[1, 2], [3, 3]])),
        torch.tensor([7, 6]),
        torch.tensor([2, 2]),
    ]
    here = [each.cpu() for each in given]
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: (tensor, device))
    torch.use_deterministic_algorithms(True)
    found, device = losses._ctc(*given)  # type: ignore[arg-type, misc]
    assert device == OnGpu.device and torch.equal(found, losses._ctc(*here))
