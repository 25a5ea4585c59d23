"""Computes attention within packed rows, for our own modules and, by registration, inside Hugging Face models."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.errors import RecipeError
from echox.models.ragged import PackedRows, lengths_to_mask

NAME = "echox_packed"
"""Of the attention in transformers' registry: packed rows where they are given, transformers' own SDPA elsewhere."""
EAGER_NAME = "echox_packed_eager"
"""Of the attention for models that transformers runs without SDPA, because they cap their scores (Gemma 2) or have
sinks (GPT-OSS): the model's own eager attention, on packed rows too."""
_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configurations call them, that compute on rows of which they see no other."""


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
    return rows.from_padded(padded.transpose(1, 2)).squeeze(0)


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
        RecipeError: the model's attention cannot be replaced, or it has layers that would look across rows.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    odd = sorted(set(getattr(model.config, "layer_types", None) or ()) - _LAYERS)
    if odd:
        raise RecipeError(
            f"{type(model).__name__} has layers of kind {', '.join(odd)}, which packed rows do not have",
            fix="set model.layout: padded",
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AttentionInterface.register(EAGER_NAME, _eager_attention)
    AttentionMaskInterface.register(EAGER_NAME, eager_mask)
    name = EAGER_NAME if model.config._attn_implementation in ("eager", EAGER_NAME) else NAME
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
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
        _check_mask(module, attention_mask)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    _check_told(module, sliding_window, {name: others.get(name) for name in ("softcap", "s_aux", "position_bias")})
    mixed_LHD = packed_attention(
        # Of a selected row the gradient would be copied into zeros.
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        rows,
        rows,
        causal=module.is_causal if is_causal is None else is_causal,
        scale=scaling,
        dropout=dropout,
        window=sliding_window,
    )
    return mixed_LHD[None], None


def _eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: PackedRows | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As `_attention`, by the eager attention in the file of the model's class; packed rows are padded for it."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise RecipeError(
            f"{type(module).__name__} has no eager attention that can be called", fix="set model.layout: padded"
        )
    if rows is None:
        _check_mask(module, attention_mask)
        return own(module, query, key, value, attention_mask, **others)[0], None
    _check_told(module, sliding_window, {"position_bias": others.get("position_bias")})
    padded = (rows.to_padded(part.transpose(1, 2)).transpose(1, 2) for part in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    mask = _additive_mask(rows, query.dtype, causal=causal, window=sliding_window)
    return rows.from_padded(own(module, *padded, mask, **others)[0]), None


def _additive_mask(rows: PackedRows, dtype: torch.dtype, *, causal: bool, window: int | None) -> Tensor:
    """0 where a key is seen and the least number of `dtype` elsewhere, `[1 or N, 1, S, S]`."""
    columns_S = torch.arange(rows.size, device=rows.lengths_N.device)
    age = columns_S[:, None] - columns_S
    seen = (age >= 0) & (age < (window or rows.size)) if causal else lengths_to_mask(rows.lengths_N, rows.size)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[None, None] if causal else mask[:, None]


def _check_mask(module: Any, attention_mask: Tensor | None) -> None:
    """Raise RecipeError where only the empty mask of packed rows came through."""
    if attention_mask is not None and attention_mask.numel() == 0:
        raise RecipeError(
            f"{type(module).__name__} was not told of its rows: the model drops keyword arguments on the way",
            fix="set model.layout: padded",
        )


def _check_told(module: Any, window: int | None, unknown: dict[str, Any]) -> None:
    """Raise RecipeError where a layer asks for what packed rows do not have, or does not name the window of its mask.

    Some models (Qwen2-MoE) put a sliding window into the mask alone, which packed rows do without.
    """
    odd = [name for name, value in unknown.items() if value is not None]
    if window != _window(module):
        odd.append(f"a window of {_window(module)} that it does not name")
    if odd:
        raise RecipeError(
            f"{type(module).__name__} wants {', '.join(odd)}, which packed rows do not have",
            fix="set model.layout: padded",
        )


def _window(module: Any) -> int | None:
    """The sliding window of the layer, as transformers' masks take it from the configuration."""
    config = getattr(module, "config", None)
    window: int | None = getattr(config, "sliding_window", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return None if kinds and layer is not None and kinds[layer] != "sliding_attention" else window
