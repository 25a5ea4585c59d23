"""Defines Stage III's own parts: the Denoising Adapter and the segmentation of a response."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenoisingAdapter(nn.Module):
    """Linear, ReLU, dropout, Linear without residual or norm: hidden states H to text embeddings (Eq. 2)."""

    def __init__(self, width: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, ffn)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(ffn, width)

    def forward(self, hidden_BRh: Tensor) -> Tensor:
        """`[B, R, h]` to `[B, R, h]`."""
        out: Tensor = self.outer(self.dropout(F.relu(self.inner(hidden_BRh))))
        return out


def trigger_scores(hidden_BRh: Tensor, stop_row_h: Tensor) -> Tensor:
    """Cosine of each state with the LM-head row of the full stop: `[B, R]` (paper section on streaming)."""
    return F.cosine_similarity(hidden_BRh.float(), stop_row_h.float(), dim=-1)


class TriggerRule(NamedTuple):
    """When a peak of the trigger score ends a segment; lengths in text tokens (released inference code)."""

    min_tokens: int = 20
    max_wait: int = 50
    threshold: float = 0.1
    look_ahead: int = 5


def trigger_segments(scores_BR: Tensor, mask_BR: Tensor, rule: TriggerRule) -> Tensor:
    """Segment number of each position by the streaming trigger: `[B, R]`, counted from 0 within a row.

    A position ends a segment if its score is the largest within `look_ahead` positions on both sides and the segment
    has `max_wait` tokens before it, or `min_tokens` tokens and a score above `threshold`. The last `look_ahead`
    positions cannot be judged while streaming and are flushed with the end. There is no loop over time: each position
    knows where the segment after one from there would start, and the starts from 0 on are found by doubling.
    """
    look_ahead = rule.look_ahead
    span = 2 * look_ahead + 1
    padded = F.pad(scores_BR.masked_fill(~mask_BR, -torch.inf), (look_ahead, look_ahead), value=-torch.inf)
    peak = scores_BR >= padded.unfold(1, span, 1).amax(-1)
    judged = F.pad(mask_BR, (0, look_ahead))[:, look_ahead:] & mask_BR
    peak = peak & judged
    high = peak & (scores_BR > rule.threshold)
    next_BS = _next_start(high, peak, rule)
    # A segment has at least so many tokens, so that doubling the number of starts soon finds all of them.
    shortest, size = min(rule.min_tokens, rule.max_wait) + 1, scores_BR.shape[1]
    starts_BK = next_BS.new_zeros(len(scores_BR), 1)
    while starts_BK.shape[1] < size // shortest + 1:
        starts_BK = torch.cat([starts_BK, next_BS.gather(1, starts_BK)], dim=1)
        next_BS = next_BS.gather(1, next_BS)
    begins_BS = torch.zeros_like(next_BS).scatter_add_(1, starts_BK, torch.ones_like(starts_BK))
    return begins_BS[:, :size].cumsum(1) - 1


def _next_start(high_BR: Tensor, peak_BR: Tensor, rule: TriggerRule) -> Tensor:
    """Where the segment after one that starts at each position starts: `[B, R + 1]`, R for none."""
    size = peak_BR.shape[1]
    places_R = torch.arange(size, device=peak_BR.device)
    ends_2BR = torch.where(torch.stack([high_BR, peak_BR]), places_R, size)
    ends_2BS = F.pad(ends_2BR, (0, 1), value=size).flip(-1).cummin(-1).values.flip(-1)
    waited = [
        F.pad(ends_BS[:, wait:], (0, wait), value=size)
        for ends_BS, wait in zip(ends_2BS, (min(rule.min_tokens, size + 1), min(rule.max_wait, size + 1)), strict=True)
    ]
    return (torch.minimum(*waited) + 1).clamp(max=size)


class Segments(NamedTuple):
    """Where each position of a response goes when its segments become rows of their own.

    Attributes:
        row_BR, column_BR: target of each position; padding points to row `rows`, which `scatter` drops.
        rows: N, the number of segments in the batch.
        mask_NT: True on real positions of the segment rows.
        owner_N: which sample each segment row came from.
        full: the longest row has no padding, as there is a segment.
    """

    row_BR: Tensor
    column_BR: Tensor
    rows: int
    mask_NT: Tensor
    owner_N: Tensor
    full: bool = False

    def scatter(self, values_BRx: Tensor) -> Tensor:
        """Move `[B, R, ...]` into `[N, T, ...]`; differentiable."""
        shape = (self.rows + 1, self.mask_NT.shape[1], *values_BRx.shape[2:])
        out = values_BRx.new_zeros(shape).index_put((self.row_BR, self.column_BR), values_BRx)
        return out[: self.rows]


def segment_rows(segment_BR: Tensor, mask_BR: Tensor) -> Segments:
    """Turn segment numbers into row and column indices (one host sync: the number of rows and the longest)."""
    batch, length = segment_BR.shape
    segment_BR = segment_BR.masked_fill(~mask_BR, -1)
    first = torch.ones_like(mask_BR)
    first[:, 1:] = segment_BR[:, 1:] != segment_BR[:, :-1]
    first = first & mask_BR
    row_BR = first.flatten().long().cumsum(0).view(batch, length) - 1
    positions = torch.arange(length, device=mask_BR.device).expand(batch, -1)
    start_BR = torch.where(first, positions, torch.zeros_like(positions)).cummax(1).values
    column_BR = (positions - start_BR).masked_fill(~mask_BR, 0)
    rows, longest = torch.stack([first.sum(), column_BR.max() + 1]).tolist()  # host sync
    full, rows, longest = rows > 0, max(int(rows), 1), int(longest)
    row_BR = row_BR.masked_fill(~mask_BR, rows)
    owner_B = torch.arange(batch, device=mask_BR.device)[:, None].expand(-1, length)
    owner_N = owner_B.new_zeros(rows + 1).index_put((row_BR,), owner_B)[:rows]
    mask_NT = mask_BR.new_zeros(rows + 1, longest).index_put((row_BR, column_BR), mask_BR)[:rows]
    return Segments(row_BR, column_BR, rows, mask_NT, owner_N, full)
