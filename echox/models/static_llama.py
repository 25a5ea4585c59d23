"""Runs a Llama body on a static KV cache, so that every decode step has the same operators, shapes and addresses.

Transformers' own forward makes its mask with a host sync, lets the cache grow, and takes twice the kernels: a GPU then
waits for the host that launches them. The weights and the results are those of the body; two matrices that read the
same input are laid side by side, and rotary sine and cosine are made once a step.
"""

from __future__ import annotations

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
    attention_norm_h: Tensor
    query_key_value_oh: Tensor
    attention_out_hh: Tensor
    ffn_norm_h: Tensor
    gate_up_fh: Tensor
    down_hf: Tensor


class StaticLlama:
    """The layers and the last norm of a Llama body with as many key heads as query heads and no biases.

    Args:
        body: a `LlamaModel`. Its weights are taken as they are now: under ZeRO-3 they must be gathered.
    """

    def __init__(self, body: Any) -> None:
        config = body.config
        assert config.num_key_value_heads == config.num_attention_heads and config.hidden_act == "silu"
        self.heads: int = config.num_attention_heads
        self._eps: float = config.rms_norm_eps
        self._layers = [_weights(layer) for layer in body.layers]
        self._norm_h: Tensor = body.norm.weight
        turns = body.rotary_emb.inv_freq.float()
        # Cosine is even and sine odd: the sign of the first half is that of rotate_half(x) = (-x2, x1).
        self._turns_D = torch.cat([-turns, turns])

    def empty_cache(self, rows: int, columns: int) -> StaticCache:
        """Zeros: what is masked must still be finite."""
        shape = (len(self._layers), rows, self.heads, columns, len(self._turns_D))
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
        stream_Xh = inputs_NQh.reshape(-1, width).clone() if queries > 1 else inputs_NQh.view(-1, width)
        for layer, keys_NHKD, values_NHKD in zip(self._layers, *cache, strict=True):
            mixed = F.linear(self._normed(stream_Xh, layer.attention_norm_h), layer.query_key_value_oh)
            mixed = mixed.view(count, queries, 3 * self.heads, -1)
            turned = mixed[:, :, : 2 * self.heads]
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin).transpose(1, 2)
            keys_NHKD.index_copy_(2, columns_Q, turned[:, self.heads :])
            values_NHKD.index_copy_(2, columns_Q, mixed[:, :, 2 * self.heads :].transpose(1, 2))
            attended = F.scaled_dot_product_attention(
                turned[:, : self.heads], keys_NHKD[:, :, :size], values_NHKD[:, :, :size], attn_mask=mask_N1QK
            )
            stream_Xh.addmm_(attended.transpose(1, 2).reshape(-1, width), layer.attention_out_hh.t())
            gate, up = F.linear(self._normed(stream_Xh, layer.ffn_norm_h), layer.gate_up_fh).chunk(2, dim=-1)
            stream_Xh.addmm_(F.silu(gate) * up, layer.down_hf.t())
        return self._normed(stream_Xh, self._norm_h).view(count, queries, width)

    def _normed(self, stream_Xh: Tensor, weight_h: Tensor) -> Tensor:
        return F.rms_norm(stream_Xh, list(weight_h.shape), weight_h, self._eps)


def _weights(layer: Any) -> _Layer:
    attention, ffn = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]),
        ffn.down_proj.weight,
    )


def _resized(part_YNHKD: Tensor, rows_n: Tensor | None, columns: int, left: int) -> Tensor:
    part_YNHKD = part_YNHKD if rows_n is None else part_YNHKD.index_select(1, rows_n)
    return F.pad(part_YNHKD, (0, 0, left, columns - part_YNHKD.shape[3] - left))
