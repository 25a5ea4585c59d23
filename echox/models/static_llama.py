"""Runs a Llama body on a static KV cache, so that every decode step has the same operators, shapes and addresses.

Transformers' own forward makes its mask with a host sync, lets the cache grow, and takes twice the kernels: a GPU then
waits for the host that launches them. The weights and the results are those of the body; two matrices that read the
same input are laid side by side, and rotary sine and cosine are made once a step.

A CPU reads every weight once a step. Of a matrix with more outputs than inputs it reads the rows of an input faster
than those of an output (MKL on one core of an AMD EPYC, one row: 12.7 against 6.9 GB/s for 3072 outputs of 576 inputs,
7.9 against 11.2 for 576 of 1536), so there such a matrix is laid out by inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class StaticCache(NamedTuple):
    """Keys and values of Y layers, N rows, H heads, K columns of D numbers: `[Y, N, H, K, D]`."""

    keys_YNHKD: Tensor
    values_YNHKD: Tensor

    def resized(self, rows_n: Tensor | None, columns: int, left: int = 0) -> StaticCache:
        """A copy of some rows with `columns` columns, moved `left` columns to the right; the new ones are 0."""
        return StaticCache(*(_resized(part, rows_n, columns, left) for part in self))

    def with_rows(self, other: StaticCache) -> StaticCache:
        """The rows of both, which have as many columns."""
        return StaticCache(*(torch.cat(parts, dim=1) for parts in zip(self, other, strict=True)))


class _Layer(NamedTuple):
    """Weights of a layer; matrices read `[in, out]`, whichever lies side by side in memory."""

    attention_norm_h: Tensor
    query_key_value_ho: Tensor
    attention_out_oh: Tensor
    ffn_norm_h: Tensor
    gate_up_hf: Tensor
    down_fh: Tensor


def is_plain_llama(body: Any) -> bool:
    """Whether `StaticLlama` computes what a decoder of transformers computes."""
    from transformers import LlamaModel

    if not isinstance(body, LlamaModel):
        return False
    config, rotary = body.config, body.rotary_emb
    return (
        config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and rotary.attention_scaling == 1.0
        and rotary.rope_type not in ("dynamic", "longrope")  # whose frequencies follow the length
    )


class StaticLlama:
    """The layers and the last norm of a Llama body, see `is_plain_llama`.

    Args:
        body: a `LlamaModel`. Its weights are taken as they are now: LoRA must be merged, and ZeRO-3 have gathered them.
        adopt: let the body's own weights be views of those that are laid side by side, so that they are kept once.
    """

    def __init__(self, body: Any, *, adopt: bool = False) -> None:
        assert is_plain_llama(body)
        config = body.config
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self._eps: float = config.rms_norm_eps
        self._layers = [_weights(layer, adopt=adopt) for layer in body.layers]
        self._norm_h: Tensor = body.norm.weight
        turns = body.rotary_emb.inv_freq.float()
        # Cosine is even and sine odd: the sign of the first half is that of rotate_half(x) = (-x2, x1).
        self._turns_D = torch.cat([-turns, turns])

    def empty_cache(self, rows: int, columns: int) -> StaticCache:
        """Zeros: what is masked must still be finite."""
        shape = (len(self._layers), rows, self.key_heads, columns, len(self._turns_D))
        return StaticCache(self._norm_h.new_zeros(shape), self._norm_h.new_zeros(shape))

    def __call__(
        self, inputs_NQh: Tensor, places_NQ: Tensor, mask_N1QK: Tensor, columns_Q: Tensor, cache: StaticCache
    ) -> Tensor:
        """Last hidden states `[N, Q, h]`; waits for nothing.

        Args:
            inputs_NQh: projected inputs.
            places_NQ: rotary positions, float32.
            mask_N1QK: 0 where a query sees a key, a large negative number elsewhere; the first K columns are attended.
            columns_Q: of the cache, into which keys and values are written.
            cache: is written to.
        """
        count, queries, width = inputs_NQh.shape
        angles_NQ1D = (places_NQ[..., None] * self._turns_D)[:, :, None]
        cos, sin = angles_NQ1D.cos().to(inputs_NQh.dtype), angles_NQ1D.sin().to(inputs_NQh.dtype)
        half, size = len(self._turns_D) // 2, mask_N1QK.shape[-1]
        heads, turning = self.heads, self.heads + self.key_heads
        stream_Xh = inputs_NQh.reshape(-1, width).clone() if queries > 1 else inputs_NQh.view(-1, width)
        for layer, keys_NHKD, values_NHKD in zip(self._layers, *cache, strict=True):
            mixed = torch.mm(self._normed(stream_Xh, layer.attention_norm_h), layer.query_key_value_ho)
            mixed = mixed.view(count, queries, turning + self.key_heads, -1)
            turned = mixed[:, :, :turning]
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin).transpose(1, 2)
            keys_NHKD.index_copy_(2, columns_Q, turned[:, heads:])
            values_NHKD.index_copy_(2, columns_Q, mixed[:, :, turning:].transpose(1, 2))
            attended = F.scaled_dot_product_attention(
                turned[:, :heads],
                keys_NHKD[:, :, :size],
                values_NHKD[:, :, :size],
                attn_mask=mask_N1QK,
                enable_gqa=heads != self.key_heads,
            )
            stream_Xh.addmm_(attended.transpose(1, 2).reshape(len(stream_Xh), -1), layer.attention_out_oh)
            gate, up = torch.mm(self._normed(stream_Xh, layer.ffn_norm_h), layer.gate_up_hf).chunk(2, dim=-1)
            stream_Xh.addmm_(F.silu(gate) * up, layer.down_fh)
        return self._normed(stream_Xh, self._norm_h).view(count, queries, width)

    def _normed(self, stream_Xh: Tensor, weight_h: Tensor) -> Tensor:
        return F.rms_norm(stream_Xh, list(weight_h.shape), weight_h, self._eps)


def _weights(layer: Any, *, adopt: bool) -> _Layer:
    attention, ffn = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], adopt=adopt),
        _side_by_side([attention.o_proj], adopt=adopt),
        layer.post_attention_layernorm.weight,
        _side_by_side([ffn.gate_proj, ffn.up_proj], adopt=adopt),
        _side_by_side([ffn.down_proj], adopt=adopt),
    )


def _side_by_side(maps: Sequence[Any], *, adopt: bool) -> Tensor:
    """Weights of linear maps of one input, `[in, out of all]`."""
    weights: list[Tensor] = [getattr(each, "base_layer", each).weight for each in maps]
    outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
    if weights[0].device.type == "cpu" and outputs > inputs:
        laid_io = torch.cat([weight.t() for weight in weights], dim=1).contiguous()
    elif len(weights) == 1:
        return weights[0].t()
    else:
        laid_io = torch.cat(weights).t()
    if adopt:
        for weight, part_io in zip(weights, laid_io.split([len(weight) for weight in weights], dim=1), strict=True):
            weight.data = part_io.t()
    return laid_io


def _resized(part_YNHKD: Tensor, rows_n: Tensor | None, columns: int, left: int) -> Tensor:
    part_YNHKD = part_YNHKD if rows_n is None else part_YNHKD.index_select(1, rows_n)
    return F.pad(part_YNHKD, (0, 0, left, columns - part_YNHKD.shape[3] - left))
