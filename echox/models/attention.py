"""Defines multi-head attention and the pre-norm encoder block of the speech adapters.

Written on linear maps and `scaled_dot_product_attention`: `nn.MultiheadAttention` reads its output weight from outside
that weight's module and takes a fused path in eval mode, and both bypass the hooks by which ZeRO-3 gathers parameters.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from echox.models.packed_attention import packed_attention
from echox.models.ragged import PackedRows, PaddedRows, Rows


class Attention(nn.Module):
    """Scaled dot-product attention with separate query and key/value inputs.

    Args:
        width: model width h; must be a multiple of `heads`.
        heads: attention heads.
        dropout: on the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries_BQh: Tensor, memory_BTh: Tensor, rows: Rows, memory_rows: Rows) -> Tensor:
        """Attend from each row of `queries_BQh` over the real positions of that row of `memory_BTh`: [B, Q, h].

        Both are in the layout that `rows` and `memory_rows` say; packed, B is 1.
        """

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], self.heads, -1)

        query, key, value = split(self.query(queries_BQh)), split(self.key(memory_BTh)), split(self.value(memory_BTh))
        dropout = self.dropout if self.training else 0.0
        if isinstance(rows, PackedRows) and isinstance(memory_rows, PackedRows):
            mixed = packed_attention(
                query.squeeze(0), key.squeeze(0), value.squeeze(0), rows, memory_rows, causal=False, dropout=dropout
            )[None]
        else:
            mixed = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=memory_rows.real[:, None, None, :],
                dropout_p=dropout,
            ).transpose(1, 2)
        projected: Tensor = self.output(mixed.flatten(2))
        return projected


class EncoderBlock(nn.Module):
    """Pre-norm Transformer encoder layer: attention, then a ReLU feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTh: Tensor, rows: Rows, *, frame_local: bool = False) -> Tensor:
        """Encode the real frames; `frame_local` lets each frame attend to itself alone (released code's effect)."""
        normed = self.attention_norm(x_BTh)
        if frame_local:
            batch, frames, width = normed.shape
            flat = normed.reshape(batch * frames, 1, width)
            alone = PaddedRows(rows.lengths_N.new_ones(batch * frames), 1)
            mixed = self.attention(flat, flat, alone, alone).view(batch, frames, width)
        else:
            mixed = self.attention(normed, normed, rows, rows)
        x_BTh = x_BTh + self.dropout(mixed)
        out: Tensor = x_BTh + self.dropout(self.ffn(self.ffn_norm(x_BTh)))
        return out
