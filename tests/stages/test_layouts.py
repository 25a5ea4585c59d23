"""Packed rows, padded rows, and one sample at a time: the same losses and the same gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echox.builders.stages import build_s2t_stage, build_t2c_stage
from echox.stream.batch import SpeechBatch, UnitBatch
from tests import tiny


def _s2t(layout: str) -> nn.Module:
    config = tiny.model_config(layout=layout)
    config = config.model_copy(update={"shrink": config.shrink.model_copy(update={"ctc_embedding": True})})
    return build_s2t_stage(config, tiny.s2t_model(config))


def _t2c(layout: str) -> nn.Module:
    torch.manual_seed(9)
    table = nn.Embedding(tiny.VOCABULARY, 32)
    return build_t2c_stage(tiny.t2c_decoder(tiny.model_config(layout=layout)), table, tiny.PREFIX, tiny.HEADER)


def _strided_t2c(layout: str) -> nn.Module:
    stage = _t2c(layout)
    stage.t2c.text_stride = 2.5
    return stage


def _echo(layout: str) -> nn.Module:
    return tiny.echo_stage(layout=layout, segmentation={"mode": "fixed", "fixed_tokens": 3})


def _unit_batch(text: list[int], words: list[int]) -> UnitBatch:
    generator = torch.Generator().manual_seed(6)

    def rows(lengths: list[int], largest: int) -> tuple[Tensor, Tensor]:
        mask = torch.arange(max(1, *lengths))[None, :] < torch.tensor(lengths)[:, None]
        return torch.randint(0, largest, mask.shape, generator=generator).masked_fill(~mask, 0), mask

    text_BT, text_mask_BT = rows(text, tiny.VOCABULARY)
    words_BM, words_mask_BM = rows(words, tiny.WORDS)
    return UnitBatch(
        ids=[str(row) for row in range(len(text))],
        step=-1,
        weight_B=torch.ones(len(text)),
        text_BT=text_BT,
        text_mask_BT=text_mask_BT,
        words_BM=words_BM,
        words_mask_BM=words_mask_BM,
    )


def _equal_rows() -> SpeechBatch:
    batch = tiny.speech_batch(3)
    one = {
        field.name: getattr(batch, field.name)[:1].expand_as(getattr(batch, field.name)).clone()
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **one)


def _short_row() -> SpeechBatch:
    """Beside ordinary rows one of two mel frames, whose answer is its end token alone."""
    batch = tiny.speech_batch(4)
    batch.frames_B[1] = 2
    batch.response_mask_BR[1, 1:] = False
    batch.response_BR[1] = 0
    batch.response_BR[1, 0] = tiny.END
    batch.transcript_lengths_B[1] = 1
    return batch


def _row(batch: Any, row: int) -> Any:
    if isinstance(batch, SpeechBatch):
        return tiny.one_row(batch, row)
    text, words = int(batch.text_mask_BT[row].sum()), int(batch.words_mask_BM[row].sum())
    pick = slice(row, row + 1)
    return UnitBatch(
        ids=[batch.ids[row]],
        step=batch.step,
        weight_B=batch.weight_B[pick],
        text_BT=batch.text_BT[pick, :text],
        text_mask_BT=batch.text_mask_BT[pick, :text],
        words_BM=batch.words_BM[pick, :words],
        words_mask_BM=batch.words_mask_BM[pick, :words],
    )


SPEECH = {
    "ragged": lambda: tiny.speech_batch(5),
    "one": lambda: tiny.speech_batch(1),
    "equal": _equal_rows,
    "short": _short_row,
}
UNITS = {
    "ragged": lambda: _unit_batch([3, 7, 1, 5], [9, 2, 14, 5]),
    "one": lambda: _unit_batch([4], [6]),
    "equal": lambda: _unit_batch([4, 4, 4], [6, 6, 6]),
    "short": lambda: _unit_batch([1, 6, 1], [1, 8, 0]),
}
STAGES = {"s2t": (_s2t, SPEECH), "t2c": (_t2c, UNITS), "strided": (_strided_t2c, UNITS), "echo": (_echo, SPEECH)}
CASES = [(stage, case) for stage, (_, batches) in STAGES.items() for case in batches]


def _losses(stage: nn.Module, batches: list[Any]) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Tensor]]:
    """Sums and counts of each loss over the batches, and the gradients of their sum."""
    found: dict[str, tuple[Tensor, int]] = {}
    stage.zero_grad()
    for batch in batches:
        terms = stage(batch)
        sum(term.total for term in terms.values()).backward()
        for name, term in terms.items():
            total, count = found.get(name, (torch.zeros(()), 0))
            found[name] = total + term.total.detach(), count + int(term.count)
    return found, {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_packed_equals_padded_equals_one_by_one(name: str, case: str) -> None:
    build, batches = STAGES[name]
    batch = batches[case]()
    packed, padded = build("packed").train(), build("padded").train()
    losses, gradients = _losses(packed, [batch])
    alone = [_row(batch, row) for row in range(len(batch.ids))]
    for oracle, given in ((padded, [batch]), (padded, alone), (packed, alone)):
        expected, wanted = _losses(oracle, given)
        assert {key: count for key, (_, count) in losses.items()} == {
            key: count for key, (_, count) in expected.items()
        }
        for key, (total, _) in losses.items():
            torch.testing.assert_close(total, expected[key][0], rtol=2e-5, atol=2e-5)
        assert gradients.keys() == wanted.keys()
        for key, gradient in gradients.items():
            largest = float(wanted[key].abs().max())
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4 * max(largest, 1.0))


def test_a_batch_on_a_device_still_knows_its_lengths_here() -> None:
    batch = tiny.speech_batch(3)
    moved = batch.to("meta").to("meta")
    assert moved.frames_B.device.type == "meta"
    assert moved.frames_on_host_B is not None and moved.frames_on_host_B.tolist() == batch.frames_B.tolist()


@pytest.mark.parametrize("name", ["s2t", "t2c"])
def test_bf16_packed_is_as_close_to_fp32_as_bf16_padded(name: str) -> None:
    build, batches = STAGES[name]
    batch = batches["ragged"]()
    exact, _ = _losses(build("padded"), [batch])
    for layout in ("packed", "padded"):
        losses, _ = _losses(build(layout).to(torch.bfloat16), [batch])
        for key, (total, _) in losses.items():
            torch.testing.assert_close(total.float(), exact[key][0], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["s2t", "t2c", "echo"])
def test_the_share_of_padding_is_zero_packed_and_real_padded(name: str) -> None:
    build, batches = STAGES[name]
    shares = {}
    for layout in ("packed", "padded"):
        stage = build(layout).eval()
        stage(batches["ragged"]())
        shares[layout] = float(stage.metrics()["perf/padding_share"])
    assert shares["packed"] == 0
    assert 0.1 < shares["padded"] < 0.9
