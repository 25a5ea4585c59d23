"""Packs ragged rows end to end for speed, or pads them with masks as the oracle, behind one interface.

Packed, the rows of a micro-batch lie end to end in one row `[1, L, ...]`: linear maps, norms and feed-forwards compute
on real positions alone, and only attention needs to know where a row ends. Padded, each row has its own line of
`[N, S, ...]`. Modules between `from_padded` and `to_padded` are written once and run in either. Neither layout loops
over rows, and none of the methods here waits for the device unless it says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["packed", "padded"]


class Rows(ABC):
    """Where the positions of N ragged rows are.

    Attributes:
        lengths_N: real positions of each row.
        size: S, columns of the padded form; no row is longer.
        computed: how many positions a module computes on, padding included.
        positions: place of each position in its row, counted from 0: `[N, S]` padded, `[1, L]` packed.
        lengths_on_host_N: the lengths on the CPU, where they are known there.
    """

    lengths_N: Tensor
    size: int
    computed: int
    positions: Tensor
    lengths_on_host_N: Tensor | None = None

    @property
    @abstractmethod
    def real(self) -> Tensor:
        """Real positions of this layout."""

    @abstractmethod
    def from_padded(self, padded_NSx: Tensor) -> Tensor:
        """Right-padded rows `[N, S, ...]` in this layout."""

    @abstractmethod
    def to_padded(self, values: Tensor) -> Tensor:
        """Back to `[N, S, ...]`; the padding holds values of real positions that mean nothing there."""

    @abstractmethod
    def broadcast(self, values_N: Tensor) -> Tensor:
        """A number of each row at all of its positions, or what broadcasts to them."""

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """True positions of each row, `[N]`."""

    @abstractmethod
    def gather(self, values: Tensor, positions: Tensor, into: Rows) -> Tensor:
        """Pick from each row the places that `positions` names in the layout `into`, which has the same rows."""

    @abstractmethod
    def subset(self, keep: Tensor) -> tuple[Rows, Tensor]:
        """Layout of the kept positions, and the place each had in its row. One host sync, for how many there are."""

    @abstractmethod
    def causal(self) -> dict[str, Any]:
        """What a Hugging Face decoder needs to know of the rows: keyword arguments of its forward."""

    @abstractmethod
    def bidirectional(self, dtype: torch.dtype) -> dict[str, Any]:
        """The same for an encoder layer computing in `dtype`."""


class PaddedRows(Rows):
    """Right-padded rows `[N, S, ...]`."""

    def __init__(self, lengths_N: Tensor, size: int) -> None:
        self.lengths_N = lengths_N
        self.size = size
        self.computed = len(lengths_N) * size
        self.positions = torch.arange(size, device=lengths_N.device).expand(len(lengths_N), -1)

    @property
    def real(self) -> Tensor:
        """`[N, S]`."""
        return lengths_to_mask(self.lengths_N, self.size)

    def from_padded(self, padded_NSx: Tensor) -> Tensor:
        """As they are."""
        return padded_NSx

    def to_padded(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def broadcast(self, values_N: Tensor) -> Tensor:
        """`[N, 1]`."""
        return values_N[:, None]

    def count(self, mask: Tensor) -> Tensor:
        """`[N]`."""
        return (mask & self.real).sum(1)

    def gather(self, values: Tensor, positions: Tensor, into: Rows) -> Tensor:
        """`[N, S, h]` and `[N, K]` to `[N, K, h]`."""
        return gather_rows(values, positions.clamp(0, self.size - 1))

    def subset(self, keep: Tensor) -> tuple[Rows, Tensor]:
        """Kept positions moved to the left."""
        keep = keep & self.real
        lengths_N = keep.sum(1)
        longest = int(lengths_N.max())  # host sync
        positions = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :longest]
        return PaddedRows(lengths_N, longest), positions

    def causal(self) -> dict[str, Any]:
        """Mask and positions, padding included."""
        return {"attention_mask": self.real.long(), "position_ids": self.positions}

    def bidirectional(self, dtype: torch.dtype) -> dict[str, Any]:
        """Additive bias `[N, 1, S, S]`."""
        bias = torch.zeros(self.real.shape, dtype=dtype, device=self.lengths_N.device)
        bias = bias.masked_fill(~self.real, torch.finfo(dtype).min)
        return {"attention_mask": bias[:, None, None, :].expand(-1, 1, self.size, -1)}


class PackedRows(Rows):
    """Rows end to end, `[1, L, ...]`.

    Args:
        lengths_N: real positions of each row.
        size: columns of the padded form; no row is longer.
        total: L, the sum of the lengths, known to the host.

    Attributes:
        starts_N1: where each row starts, and L at the end; int32, as attention kernels take it (`cu_seqlens`).
        row_L: the row that each position belongs to.
    """

    def __init__(self, lengths_N: Tensor, size: int, total: int) -> None:
        self.lengths_N = lengths_N
        self.size = size
        self.computed = total
        self.starts_N1 = F.pad(lengths_N.cumsum(0), (1, 0)).to(torch.int32)
        rows = torch.arange(len(lengths_N), device=lengths_N.device)
        self.row_L = torch.repeat_interleave(rows, lengths_N, output_size=total)
        self.positions = (torch.arange(total, device=lengths_N.device) - self.starts_N1[self.row_L])[None]

    @property
    def real(self) -> Tensor:
        """All of `[1, L]`."""
        return torch.ones_like(self.positions, dtype=torch.bool)

    def from_padded(self, padded_NSx: Tensor) -> Tensor:
        """`[N, S, ...]` to `[1, L, ...]`."""
        index_L = self.row_L * padded_NSx.shape[1] + self.positions[0]
        return padded_NSx.flatten(0, 1).index_select(0, index_L)[None]

    def to_padded(self, values: Tensor) -> Tensor:
        """`[1, L, ...]` to `[N, S, ...]`."""
        shape = (len(self.lengths_N), self.size, *values.shape[2:])
        if self.computed == 0:  # still in the graph: ranks must agree on which parameters receive gradients
            return values.new_zeros(shape) + values.sum().to(values.dtype)
        return values.squeeze(0).index_select(0, self._padded_index).view(shape)

    @cached_property
    def _padded_index(self) -> Tensor:
        columns_S = torch.arange(self.size, device=self.lengths_N.device)
        columns_NS = torch.minimum(columns_S, (self.lengths_N - 1).clamp(min=0)[:, None])
        return (self.starts_N1[:-1, None] + columns_NS).clamp(max=self.computed - 1).flatten()

    def broadcast(self, values_N: Tensor) -> Tensor:
        """`[1, L]`."""
        return values_N[self.row_L][None]

    def count(self, mask: Tensor) -> Tensor:
        """`[N]`."""
        running = F.pad(mask[0].cumsum(0), (1, 0))[self.starts_N1]
        return running[1:] - running[:-1]

    def gather(self, values: Tensor, positions: Tensor, into: Rows) -> Tensor:
        """`[1, L, h]` and `[1, K]` to `[1, K, h]`."""
        index_1K = into.broadcast(self.starts_N1[:-1]) + positions
        return values.squeeze(0).index_select(0, index_1K.squeeze(0))[None]

    def subset(self, keep: Tensor) -> tuple[Rows, Tensor]:
        """Kept positions end to end."""
        lengths_N = self.count(keep)
        longest, total = torch.stack([lengths_N.max(), lengths_N.sum()]).tolist()  # host sync
        index_K = _where(keep[0], total)
        return PackedRows(lengths_N, longest, total), self.positions[:, index_K]

    def causal(self) -> dict[str, Any]:
        """Positions that restart with each row, and the rows themselves for `packed_attention`.

        The mask is empty: four dimensions keep the model from deriving one of its own, and an attention that does not
        know of packed rows fails on it rather than look across them.
        """
        return {**self.bidirectional(torch.float32), "position_ids": self.positions}

    def bidirectional(self, dtype: torch.dtype) -> dict[str, Any]:
        """See `causal`; encoder layers take no positions."""
        return {"attention_mask": self.positions.new_empty(1, 1, 0, 0), "rows": self}


def rows_of(lengths_N: Tensor, size: int, layout: Layout, lengths_on_host: Tensor | None = None) -> Rows:
    """Layout of right-padded rows `[N, size, ...]`.

    Packing must know the sum of the lengths: a host sync, unless `lengths_on_host` repeats them on the CPU.
    """
    rows: Rows
    if layout == "padded":
        rows = PaddedRows(lengths_N, size)
    else:
        known = lengths_N if lengths_on_host is None else lengths_on_host
        rows = PackedRows(lengths_N, size, int(known.sum()))  # host sync, where not known
    rows.lengths_on_host_N = lengths_on_host
    return rows


class Joined(NamedTuple):
    """Blocks laid end to end, row by row, and where the positions are that predict the last block.

    Attributes:
        values: the joined rows, in their layout.
        rows: that layout.
        targets: layout of the last block by itself.
        before: for each target, the place in its row of the position before it.
    """

    values: Tensor
    rows: Rows
    targets: Rows
    before: Tensor

    def predicting(self, values: Tensor) -> Tensor:
        """What stands one position before each target, in the targets' layout."""
        return self.rows.gather(values, self.before, self.targets)

    def at_targets(self, values: Tensor) -> Tensor:
        """What stands at each target itself, in the targets' layout; not where the end is open."""
        return self.rows.gather(values, self.before + 1, self.targets)


def join(blocks: Sequence[Tensor], masks: Sequence[Tensor], layout: Layout, *, open_end: bool = False) -> Joined:
    """Lay blocks `[N, S_i, h]` end to end, without the padding between them. One host sync, for the size of the result.

    Args:
        blocks: at least one position of each row is real in all blocks together.
        masks: True on real positions; those of the last block are its first ones.
        layout: of the result.
        open_end: also predict what would follow the last block.
    """
    lengths_N, last_N = sum(mask.sum(1) for mask in masks), masks[-1].sum(1)
    assert isinstance(lengths_N, Tensor)
    size = masks[-1].shape[1] + open_end
    values: Tensor
    rows: Rows
    targets: Rows
    if layout == "padded":
        joined = join_rows(blocks, masks)
        values, rows = joined.values_BLh, PaddedRows(lengths_N, joined.values_BLh.shape[1])
        targets = PaddedRows(last_N + open_end, size)
    else:
        known = torch.stack([lengths_N.max(), lengths_N.sum(), last_N.sum()])
        longest, total, last = known.tolist()  # host sync
        index_L = _where(torch.cat(list(masks), dim=1).flatten(), total)
        values = torch.cat(list(blocks), dim=1).flatten(0, 1).index_select(0, index_L)[None]
        rows = PackedRows(lengths_N, longest, total)
        targets = PackedRows(last_N + open_end, size, last + open_end * len(last_N))
    return Joined(values, rows, targets, targets.broadcast(lengths_N - last_N - 1) + targets.positions)


def padding_share(*rows: Rows) -> Tensor:
    """Share of the computed positions that hold no data."""
    real = torch.stack([part.lengths_N.sum() for part in rows]).sum()
    return 1 - real / max(sum(part.computed for part in rows), 1)


def _where(mask_X: Tensor, count: int) -> Tensor:
    """Indices of the `count` True elements, in order: `nonzero` without its host sync."""
    slots_X = torch.where(mask_X, mask_X.cumsum(0) - 1, count)
    index = torch.empty(count + 1, dtype=torch.long, device=mask_X.device)
    return index.scatter_(0, slots_X, torch.arange(len(mask_X), device=mask_X.device))[:count]


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


def join_rows(
    blocks: Sequence[Tensor], masks: Sequence[Tensor], *, pad_left: bool = False, one_is_full: bool = False
) -> JoinedRows:
    """Concatenate blocks [B, L_i, h] along the row and squeeze the padding out of the middle.

    One host synchronisation, for the longest row: without it the LLM would compute on every block's padding.

    Args:
        blocks, masks: in order.
        pad_left: padding of the result.
        one_is_full: some row has no padding in any block, so that the longest is known.
    """
    values = torch.cat(list(blocks), dim=1)
    mask = torch.cat(list(masks), dim=1)
    lengths = mask.sum(1)
    longest = mask.shape[1] if one_is_full else int(lengths.max())  # host sync, unless one is full
    order = torch.argsort((mask if pad_left else ~mask).to(torch.uint8), dim=1, stable=True)
    order = order[:, -longest:] if pad_left else order[:, :longest]
    new_column = mask.cumsum(1) - 1
    if pad_left:
        new_column = new_column + (longest - lengths)[:, None]
    new_column = new_column.clamp(0, max(longest - 1, 0))
    columns = list(new_column.split([block.shape[1] for block in blocks], dim=1))
    return JoinedRows(gather_rows(values, order), mask.gather(1, order), columns)


def counted_positions(
    counted: Sequence[Tensor], kept: Sequence[Tensor], size: int, *, pad_left: bool = False
) -> Tensor:
    """Positions `[B, size]` of the kept columns of blocks, which leave gaps where others count; 0 on padding.

    Args:
        counted, kept: masks of the blocks; what is kept counts too.
        size: of the longest row of kept columns.
        pad_left: padding of the result.
    """
    counted_BX, kept_BX = torch.cat(list(counted), dim=1), torch.cat(list(kept), dim=1)
    places_BX = (counted_BX.long().cumsum(1) - 1).masked_fill(~kept_BX, 0)
    order = torch.argsort((kept_BX if pad_left else ~kept_BX).to(torch.uint8), dim=1, stable=True)
    return places_BX.gather(1, order[:, -size:] if pad_left else order[:, :size])


def position_ids(mask_BL: Tensor) -> Tensor:
    """Contiguous position ids of the real positions, 0 on left padding: [B, L] (U21)."""
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)
