"""Ragged rows inside padded tensors: joining, selecting and cutting them without a loop over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class JoinedRows(NamedTuple):
    """Blocks laid end to end, row by row, without the padding between them.

    Attributes:
        values_BLh: joined rows, padded on one side.
        mask_BL: True on real positions.
        columns: for each block, its positions' new column, [B, block length]; meaningless on padding.
    """

    values_BLh: Tensor
    mask_BL: Tensor
    columns: list[Tensor]


def lengths_to_mask(lengths_B: Tensor, size: int) -> Tensor:
    """True on the first `lengths_B` positions of `size`: [B, size]."""
    return torch.arange(size, device=lengths_B.device)[None, :] < lengths_B[:, None]


def gather_rows(values_BLh: Tensor, index_BK: Tensor) -> Tensor:
    """Pick columns of each row: [B, L, h] and [B, K] to [B, K, h]."""
    return values_BLh.gather(1, index_BK[:, :, None].expand(-1, -1, values_BLh.shape[2]))


def join_rows(blocks: Sequence[Tensor], masks: Sequence[Tensor], *, pad_left: bool = False) -> JoinedRows:
    """Concatenate blocks [B, L_i, h] along the row and squeeze the padding out of the middle.

    One host synchronisation, for the longest row: without it the LLM would compute on every block's padding.
    """
    values = torch.cat(list(blocks), dim=1)
    mask = torch.cat(list(masks), dim=1)
    lengths = mask.sum(1)
    longest = int(lengths.max())  # host sync
    order = torch.argsort((mask if pad_left else ~mask).to(torch.uint8), dim=1, stable=True)
    order = order[:, -longest:] if pad_left else order[:, :longest]
    new_column = mask.cumsum(1) - 1
    if pad_left:
        new_column = new_column + (longest - lengths)[:, None]
    new_column = new_column.clamp(0, max(longest - 1, 0))
    columns = list(new_column.split([block.shape[1] for block in blocks], dim=1))
    return JoinedRows(gather_rows(values, order), mask.gather(1, order), columns)


def positions(mask_BL: Tensor) -> Tensor:
    """Contiguous position ids of the real positions, 0 on left padding: [B, L] (U21)."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)
