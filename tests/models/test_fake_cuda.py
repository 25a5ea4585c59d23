"""Stage I on fake CUDA tensors, for which no GPU is needed: which kernels it takes, and that no devices mix.

What the host reads of the device (how many frames were kept, how long rows are) is noted in a run on the CPU and told
again in the same order.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from echox.stages import losses
from tests.stages import topology

READS = {"__int__", "__bool__", "__float__", "tolist", "item"}
CUDA = torch.device("cuda", 0)


class Told(TorchFunctionMode):
    """Notes what the host reads, or tells it."""

    def __init__(self, known: list[Any] | None = None) -> None:
        super().__init__()
        self.noted: list[Any] = []
        self._known = None if known is None else deque(known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in READS:
            return func(*args, **(kwargs or {}))
        if self._known is None:
            found = func(*args, **(kwargs or {}))
        else:
            asked, found = self._known.popleft()
            assert asked == name, "the host reads something else of a GPU"
        self.noted.append((name, found))
        return found


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def total(stage: Any, batch: Any) -> Tensor:
    return torch.stack([term.total for term in stage(batch).values()]).sum()


def ctc(log_probs_TBS: Tensor, target_BC: Tensor, frames_B: Tensor, lengths_B: Tensor) -> Tensor:
    assert log_probs_TBS.device == target_BC.device == CUDA and frames_B.is_cpu and lengths_B.is_cpu
    return log_probs_TBS.sum((0, 2))


def test_on_a_gpu_packed_rows_take_the_variable_length_kernel_and_no_devices_mix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = 2
    monkeypatch.setattr(topology, "ENCODER_LAYERS", layers)
    stage, batch = topology.s2t_stage(layers=layers).to(torch.bfloat16).eval(), topology.batch_of(4)
    with torch.no_grad(), Told() as said:
        total(stage, batch)
    assert len(said.noted) == 4  # of which the first two are known to the host
    monkeypatch.setattr(losses, "_ctc", ctc)  # torch has no fake of it
    monkeypatch.setattr(FakeTensor, "tolist", Tensor.tolist)  # its own asks for one element after the other
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode() as fake:
        parts = {
            name: fake.from_tensor(tensor).to(CUDA)
            for named in (stage.named_parameters(), stage.named_buffers())
            for name, tensor in named
        }
        moved = {
            name: fake.from_tensor(value).to("cpu" if "on_host" in name else CUDA)
            for name, value in vars(batch).items()
            if isinstance(value, Tensor)
        }
        for name, value in moved.items():
            setattr(batch, name, value)
        with torch.no_grad(), Told(said.noted), Operators() as operators:
            found = torch.func.functional_call(_Losses(stage), {f"stage.{k}": v for k, v in parts.items()}, (batch,))
    assert isinstance(found, FakeTensor) and found.device == CUDA
    # Encoder, alignment, look-back and LLM.
    assert sum("_varlen_attn" in name for name in operators.names) == layers + 1 + 1 + layers
    assert not any("scaled_dot_product" in name for name in operators.names)
    # Two norms of an LLM layer and the last one; LayerNorms of the speech front end have a kernel of their own.
    assert operators.names.count("aten._fused_rms_norm.default") == 2 * layers + 1
    assert "aten.rsqrt.default" not in operators.names


class _Losses(torch.nn.Module):
    def __init__(self, stage: torch.nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, batch: Any) -> Tensor:
        return total(self.stage, batch)
