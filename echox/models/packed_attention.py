"""Computes attention within packed rows, for our own modules and, by registration, inside Hugging Face models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.errors import RecipeError
from echox.models.ragged import PackedRows, lengths_to_mask

NAME = "echox_packed"
"""Of the attention in transformers' registry: packed rows where they are given, transformers' own SDPA elsewhere."""


def packed_attention(
    query_LHD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    rows: PackedRows,
    memory: PackedRows,
    *,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Each row of `rows` attends to the same row of `memory` and to no other: `[L, H, D]`.

    On a GPU, torch's variable-length flash attention where it can: half precision, heads of a multiple of 8 up to 256
    wide, no dropout. Elsewhere the rows are padded for this one operation: exact, and on a CPU several times as fast as
    a mask over all pairs of packed positions.

    Args:
        query_LHD: L positions of H heads.
        key_TKD, value_TKD: K heads, H a multiple of K.
        rows, memory: where the queries' and the keys' rows are; the same object for self-attention.
        causal: a query sees no later key; for self-attention only.
        scale: of the scores; None for 1 / sqrt(D).
        dropout: on the attention weights.
        window: most recent keys that a causal query sees, itself included; None for all.
    """
    if _flash_takes(query_LHD, dropout):
        from torch.nn.attention.varlen import varlen_attn

        mixed = varlen_attn(
            query_LHD,
            key_TKD,
            value_TKD,
            rows.starts_N1,
            memory.starts_N1,
            rows.size,
            memory.size,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0) if causal else (-1, -1),
        )
        assert isinstance(mixed, Tensor)  # alone, as no auxiliary output is asked for
        return mixed
    mask = None
    if not causal:
        mask = lengths_to_mask(memory.lengths_N, memory.size)[:, None, None, :]
    elif window is not None and window < rows.size:
        columns_S = torch.arange(rows.size, device=query_LHD.device)
        age = columns_S[:, None] - columns_S
        mask = (age >= 0) & (age < window)
    padded = F.scaled_dot_product_attention(
        rows.to_padded(query_LHD[None]).transpose(1, 2),
        memory.to_padded(key_TKD[None]).transpose(1, 2),
        memory.to_padded(value_TKD[None]).transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query_LHD.shape[1] != key_TKD.shape[1],
    )
    return rows.from_padded(padded.transpose(1, 2))[0]


def _flash_takes(query_LHD: Tensor, dropout: float) -> bool:
    return (
        query_LHD.is_cuda
        and query_LHD.dtype in (torch.float16, torch.bfloat16)
        and query_LHD.shape[2] % 8 == 0
        and query_LHD.shape[2] <= 256
        and dropout == 0
        and torch.cuda.get_device_capability(query_LHD.device) >= (8, 0)
    )


def use_packed_attention(model: Any) -> None:
    """Let a Hugging Face model attend within packed rows when its forward is given `rows`.

    Raises:
        RecipeError: the model's attention cannot be replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise RecipeError(
            f"{type(model).__name__} does not let its attention be replaced", fix="set model.layout: padded"
        )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: PackedRows | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its attention: `[1, H, L, D]` to `[1, L, H, D]`."""
    if rows is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise RecipeError(
                f"{type(module).__name__} was not told of its rows: the model drops keyword arguments on the way",
                fix="set model.layout: padded",
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    odd = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if odd:
        raise RecipeError(
            f"{type(module).__name__} wants {', '.join(odd)}, which packed rows do not have",
            fix="set model.layout: padded",
        )
    mixed_LHD = packed_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        rows,
        rows,
        causal=module.is_causal if is_causal is None else is_causal,
        scale=scaling,
        dropout=dropout,
        window=sliding_window,
    )
    return mixed_LHD[None], None
