"""Computes low-rank updates of frozen linear maps with few kernels; maps that read one input share a product with A.

The layers, their tensors, names and files stay PEFT's; only the arithmetic of a forward differs. PEFT computes A, B,
the scale and the sum of each map by themselves: 35 kernels in a Llama layer with its seven maps. Here `q_proj`,
`k_proj` and `v_proj` read one product with their three A, `gate_proj` and `up_proj` one with their two, and B, scale
and sum are one kernel: 18.

Dropout falls on the input that a product reads. Where PEFT draws a mask for each map, maps that share a product share
its mask: every element of the input is still dropped with the same probability, for a layer's q, k and v together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as PeftLinear
else:
    PeftLinear = object

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of maps that read the same vectors where one module has them side by side."""
ADAPTER = "default"
"""PEFT's name of the one adapter."""


class FusedForward(PeftLinear):
    """Forward of a PEFT layer, the next of a class's bases, over a linear map: W x + b + s B A dropout(x).

    Attributes:
        lora_input: the product with A, which other maps may share.
    """

    lora_input: LoraInput

    @property
    def a(self) -> nn.Linear:
        """The map to the rank of the update; only its weight is used."""
        found = self.lora_A[ADAPTER]
        assert isinstance(found, nn.Linear)
        return found

    @property
    def b(self) -> nn.Linear:
        """The map back from it."""
        found = self.lora_B[ADAPTER]
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.merged or others or options:
            plain: Tensor = super().forward(x, *others, **options)
            return plain
        out: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return out
        reduced = self.lora_input.reduced(self, x)
        updated = torch.addmm(
            out.reshape(-1, out.shape[-1]),
            reduced.reshape(-1, reduced.shape[-1]),
            self.b.weight.t(),
            alpha=self.scaling[ADAPTER],
        )
        return updated.view(out.shape)

    def stacked_weights(self) -> Iterator[tuple[Any, str, list[nn.Module]]]:
        """Object and attribute that want one tensor over the weights of these modules, stacked in this order."""
        members = self.lora_input.members
        if len(members) > 1 and members[0] is self:
            yield self.lora_input, "stacked", [member.a for member in members]


class LoraInput:
    """The product of one input with the A of all maps that read it, computed when the first of them asks.

    It is kept until the last of them has taken its part: a weak reference tells the input that they share from another.

    Attributes:
        members: the maps, in the order of `stacked`.
        stacked: their A `[r of all, in]` where they lie behind each other in memory already; None where they do not.
    """

    def __init__(self, members: Sequence[FusedForward]) -> None:
        self.members = list(members)
        self.stacked: Tensor | None = None
        self._of: weakref.ref[Tensor] | None = None
        self._parts: dict[int, Tensor] = {}

    def reduced(self, member: FusedForward, x: Tensor) -> Tensor:
        """A dropout(x) of one of the maps, `[..., r]`."""
        if self._of is None or self._of() is not x or id(member) not in self._parts:
            product = F.linear(member.lora_dropout[ADAPTER](x), self._weight())
            ranks = [each.a.out_features for each in self.members]
            self._parts = dict(zip(map(id, self.members), product.split(ranks, dim=-1), strict=True))
            self._of = weakref.ref(x)
        part = self._parts.pop(id(member))
        if not self._parts:
            self._of = None
        return part

    def _weight(self) -> Tensor:
        if self.stacked is not None:
            return self.stacked
        weights = [member.a.weight for member in self.members]
        return weights[0] if len(weights) == 1 else torch.cat(weights)


def share_inputs(parent: nn.Module) -> None:
    """Let maps of `parent` that read the same vectors share a product; every other has one of its own."""
    fused = {name: child for name, child in parent.named_children() if isinstance(child, FusedForward)}
    for child in fused.values():
        child.lora_input = LoraInput([child])
    for names in TOGETHER:
        found = [fused[name] for name in names if name in fused]
        if len({each.a.in_features for each in found}) == 1:
            together = LoraInput(found)
            for each in found:
                each.lora_input = together


@torch.no_grad()
def merge_lora(llm: nn.Module) -> None:
    """Add s B A to the weight of every map with an update, in place: W x + b is then all that a forward computes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in llm.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


@contextmanager
def without_lora(llm: nn.Module) -> Iterator[None]:
    """Switch LoRA off, and on again; it must not be merged.

    PEFT's own switch also sets which parameters need gradients, which ZeRO-3 must not meet in the midst of a run.
    """
    layers: list[Any] = [module for module in llm.modules() if hasattr(module, "_disable_adapters")]
    assert not any(layer.merged for layer in layers), "an update that is merged cannot be switched off"
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
