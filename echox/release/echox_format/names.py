"""Turns the speech tensors of a release into those of our Stage III and back; every bit stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from echox.release.echox_format.shape import END_OF_TURN, ReleaseShape

FRONT = "s2t.front_end."
CTC_HEAD, CTC_TOKENS = f"{FRONT}ctc_head.linear.weight", f"{FRONT}ctc_head.tokens"
ECHO = "echo."
UNITS, HEAD = f"{ECHO}unit_embedding.weight", f"{ECHO}head.weight"
TEXT_TABLE = "unit_translator.model.embed_tokens.weight"
_RELEASED = "unit_translator."


class Pair(NamedTuple):
    """A released tensor, and ours that lie one behind the other in it."""

    released: str
    ours: tuple[str, ...]


def pairs(shape: ReleaseShape) -> Iterator[Pair]:
    """All that differ in their names and cuts alone."""
    layer, block = "model.asr_transformer_encoder.layers.0.", f"{FRONT}alignment.block."
    yield from _affine("model.mm_projector1", f"{FRONT}alignment.projection")
    yield from _attention(f"{layer}self_attn.", f"{block}attention.")
    yield from _affine(f"{layer}norm1", f"{block}attention_norm")
    yield from _affine(f"{layer}norm2", f"{block}ffn_norm")
    yield from _affine(f"{layer}linear1", f"{block}ffn.0")
    yield from _affine(f"{layer}linear2", f"{block}ffn.3")
    yield from _affine("model.out_norm", f"{FRONT}alignment.norm")
    yield from _attention("model.lbm.encoder_attn.", f"{FRONT}shrink.look_back.")
    yield from _affine("model.lbm.atten_layer_norm", f"{FRONT}shrink.norm")
    yield from _affine(f"{_RELEASED}adapter", f"{ECHO}projection")
    yield from _affine(f"{_RELEASED}aligner_MLP.0", "denoising.inner")
    yield from _affine(f"{_RELEASED}aligner_MLP.3", "denoising.outer")
    body = f"{_RELEASED}model."
    yield Pair(f"{body}norm.weight", (f"{ECHO}body.norm.weight",))
    for name in shape.speech():
        if name.startswith(f"{body}layers."):
            yield Pair(name, (f"{ECHO}body.{name.removeprefix(body)}",))


def to_ours(released: Mapping[str, Tensor], shape: ReleaseShape) -> dict[str, Tensor]:
    """Our front end, Denoising Adapter and Echo decoder; T2C's text table aside.

    CTC's class of the placeholder, the last there, is the first here. The tables of units get two rows that no one has
    trained: of the end, which is a text token there, and of padding.
    """
    ours: dict[str, Tensor] = {}
    for pair in pairs(shape):
        parts = released[pair.released].chunk(len(pair.ours))
        ours |= {name: part.contiguous() for name, part in zip(pair.ours, parts, strict=True)}
    ours[CTC_HEAD] = released["model.audio_feature_head.weight"].roll(1, 0)
    ours[CTC_TOKENS] = torch.arange(shape.vocabulary).roll(1)
    table, head = released[f"{_RELEASED}unit_embedding.weight"], released[f"{_RELEASED}lm_head.weight"]
    ours[UNITS] = torch.cat([table, table.new_zeros(2, table.shape[1])])
    ours[HEAD] = torch.cat([head, head[END_OF_TURN, None], head.new_zeros(1, head.shape[1])])
    return ours


def to_released(ours: Mapping[str, Tensor], shape: ReleaseShape) -> dict[str, Tensor]:
    """The inverse of `to_ours`, from an Echo decoder with or without classes of text.

    The row of the end goes to the token that ends a text. Where there are no classes of text, theirs are the mean of
    the others: a mean of logits is never the largest of them.
    """
    released = {pair.released: torch.cat([ours[name] for name in pair.ours]) for pair in pairs(shape)}
    released["model.audio_feature_head.weight"] = ours[CTC_HEAD].roll(-1, 0)
    released[f"{_RELEASED}unit_embedding.weight"] = ours[UNITS][: shape.units].clone()
    head, classes = ours[HEAD].clone(), shape.units + 2
    units, end = head[-classes:-2], head[-2]
    text = head[:-classes]
    if not len(text):
        text = torch.cat([units, end[None]]).float().mean(0).to(head.dtype).expand(shape.vocabulary, -1).clone()
    text = with_rows(text, shape.vocabulary)
    text[END_OF_TURN] = end
    released[f"{_RELEASED}lm_head.weight"] = torch.cat([text, units])
    return released


def with_rows(table_Vh: Tensor, rows: int) -> Tensor:
    """A copy of a table of text with a row for the placeholder, zeros, where it has none."""
    return torch.cat([table_Vh, table_Vh.new_zeros(rows - len(table_Vh), table_Vh.shape[1])])


def _affine(released: str, ours: str) -> Iterator[Pair]:
    for part in ("weight", "bias"):
        yield Pair(f"{released}.{part}", (f"{ours}.{part}",))


def _attention(released: str, ours: str) -> Iterator[Pair]:
    for part in ("weight", "bias"):
        cuts = tuple(f"{ours}{name}.{part}" for name in ("query", "key", "value"))
        yield Pair(f"{released}in_proj_{part}", cuts)
        yield Pair(f"{released}out_proj.{part}", (f"{ours}output.{part}",))
