"""Lists what makes a step fast, each with a switch that turns it off, so that its gain is measured and not believed.

A technique is one entry of `TECHNIQUES`. Its `off` is a context manager: while it holds, the stage computes as if no
one had thought of the technique, and afterwards it is as it was. It is given the batch and yields the one to use. One
is off unless a recipe asks for it (`engine.compile`), and measured the other way round: its switch turns it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.bench.oracle import dynamic_greedy
from echox.engine.compiler import missing_for
from echox.models import chunked_heads, compiled, packed_attention, t2c
from echox.models.greedy import BLOCK, DecodedUnits, DecodeStep, capacity
from echox.models.lora import FusedForward
from echox.models.ragged import Layout
from echox.models.step_graph import StepGraph
from echox.models.t2c import T2CDecoder
from echox.stages.echo import EchoStage

Switch = Callable[[Any, Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Technique:
    """One way to be fast.

    Attributes:
        name: in tables.
        without: what is done while it is switched off.
        off: the switch: of a stage and a batch, the batch to use instead.
        applies: whether it changes what the stage does with this batch on the device it is on.
        same_losses: the losses are the same without it, but for rounding.
    """

    name: str
    without: str
    off: Switch
    applies: Callable[[Any, Any], bool] = lambda stage, batch: True
    same_losses: bool = True


def device_of(stage: nn.Module) -> torch.device:
    """Where a stage is."""
    return next(stage.parameters()).device


def set_layout(stage: nn.Module, layout: Layout) -> None:
    """Switch a stage that was built packed; its attention serves padded rows as well."""
    part: Any
    for part in stage.modules():
        if hasattr(part, "layout"):
            part.layout = layout


@contextmanager
def _padded_rows(stage: Any, batch: Any) -> Iterator[Any]:
    before = [(part, part.layout) for part in stage.modules() if hasattr(part, "layout")]
    set_layout(stage, "padded")
    try:
        yield batch
    finally:
        for part, layout in before:
            part.layout = layout


@contextmanager
def _all_of_30_s(stage: Any, batch: Any) -> Iterator[Any]:
    encoder: Any = stage.s2t.front_end.encoder
    columns = -(-batch.mel_BMT.shape[2] // encoder.window) * encoder.window
    with mock.patch.object(encoder, "input_mode", "pad_30s"):
        yield replace(batch, mel_BMT=F.pad(batch.mel_BMT, (0, columns - batch.mel_BMT.shape[2])))


@contextmanager
def _whole_logits(stage: Any, batch: Any) -> Iterator[Any]:
    with mock.patch.object(chunked_heads, "CHUNK_ELEMENTS", 1 << 62):
        yield batch


@contextmanager
def _lora_map_by_map(stage: Any, batch: Any) -> Iterator[Any]:
    def by_peft(self: FusedForward, *inputs: Any, **options: Any) -> Tensor:
        out: Tensor = super(FusedForward, self).forward(*inputs, **options)
        return out

    with mock.patch.object(FusedForward, "forward", by_peft):
        yield batch


@contextmanager
def _growing_cache(stage: Any, batch: Any) -> Iterator[Any]:
    def by_transformers(
        self: T2CDecoder, text: Any, limit_N: Tensor, starts_NS: Tensor | None = None, **others: Any
    ) -> DecodedUnits:
        return dynamic_greedy(self, text, limit_N, starts_NS)

    with mock.patch.object(T2CDecoder, "greedy", by_transformers):
        yield batch


@contextmanager
def _eager_steps(stage: Any, batch: Any) -> Iterator[Any]:
    with mock.patch.object(StepGraph, "__call__", lambda self: self._step()):
        yield batch


@contextmanager
def _rows_stay(stage: Any, batch: Any) -> Iterator[Any]:
    with mock.patch.object(t2c, "decode", decode_whole):
        yield batch


def decode_whole(step: DecodeStep, start: int, limit_N: Tensor, *, end: int, pad: int, **others: Any) -> DecodedUnits:
    """As `greedy.decode`, all rows until the last of them has ended."""
    longest, said, columns = int(limit_N.max()) + 1, 0, step.words_NK.shape[1]
    run = StepGraph(step, limit_N.device)
    while said < longest:
        steps = min(BLOCK, longest - said)
        for _ in range(steps):
            run()
        said += steps
        words_NM = step.words_NK[:, start : start + said]
        if bool(((words_NM == end).any(1) | (limit_N < said)).all()):  # host sync, once a block
            break
        if (more := capacity(start + said + BLOCK)) > columns:
            columns = more
            step.resize(None, columns)
            run = StepGraph(step, limit_N.device)
    places_M = torch.arange(said, device=limit_N.device)
    mask_NM = (words_NM != end).cumprod(1).bool() & (places_M < limit_N[:, None])
    ended_N = ((words_NM == end) & (places_M <= limit_N[:, None])).any(1)
    most = max(int(mask_NM.sum(1).max()), 1)  # host sync
    return DecodedUnits(words_NM.masked_fill(~mask_NM, pad)[:, :most], mask_NM[:, :most], ended_N)


@contextmanager
def _masked_attention(stage: Any, batch: Any) -> Iterator[Any]:
    with mock.patch.object(packed_attention, "_flash_takes", lambda query_LHD, dropout: False):
        yield batch


@contextmanager
def _compiled(stage: Any, batch: Any) -> Iterator[Any]:
    before = [(part, type(part)) for part in stage.modules()]
    compiled.compile_pointwise(stage, compiled.by_inductor)
    try:
        yield batch
    finally:
        for part, kind in before:
            part.__class__ = kind


def _decodes(stage: Any, batch: Any) -> bool:
    return isinstance(stage, EchoStage) and stage.config.labels == "teacher"


def _hears_trimmed(stage: Any, batch: Any) -> bool:
    s2t = getattr(stage, "s2t", None)
    return s2t is not None and batch.features_BTd is None and s2t.front_end.encoder.input_mode == "trim"


def _has_lora(stage: Any, batch: Any) -> bool:
    return any(isinstance(part, FusedForward) for part in stage.modules())


def _on_gpu(stage: Any, batch: Any) -> bool:
    return device_of(stage).type == "cuda"


def _compiles(stage: Any, batch: Any) -> bool:
    return _on_gpu(stage, batch) and not missing_for(device_of(stage))


TECHNIQUES: tuple[Technique, ...] = (
    Technique("packed rows", "every row padded to the longest", _padded_rows),
    Technique("trimmed audio", "30 s of every clip encoded", _all_of_30_s, _hears_trimmed, same_losses=False),
    Technique("heads in chunks", "all logits at once", _whole_logits),
    Technique("fused LoRA", "A, B, scale and sum of each map by themselves", _lora_map_by_map, _has_lora),
    Technique("static decode", "a cache that grows, and a host sync a word", _growing_cache, _decodes),
    Technique(
        "graph",
        "kernels launched one by one",
        _eager_steps,
        lambda stage, batch: _decodes(stage, batch) and _on_gpu(stage, batch),
    ),
    Technique("rows leave the decode", "all rows decoded until the last has ended", _rows_stay, _decodes),
    Technique("variable-length attention", "rows padded for a masked one", _masked_attention, _on_gpu),
    Technique("eager layers", "rotary embedding and SwiGLU compiled", _compiled, _compiles),
)
"""In the order of the table. To add one is to write its switch above and its line here."""


def technique(name: str) -> Technique:
    """The one of that name."""
    return next(each for each in TECHNIQUES if each.name == name)
