"""Notes the rows that a forward computes on, from whose lengths its FLOP follow (`echox/models/flops.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["rows", "causal", "mel", "mask"]
WINDOW = 1500
"""Encoder frames of Whisper's window, beyond which nothing is attended."""


class _Entry(NamedTuple):
    names: tuple[str, ...]
    lengths_N: Tensor
    keys_N: Tensor | None
    kind: Kind
    known_N: Tensor | None


@dataclass
class Work:
    """The rows that a forward computed on, kept as they are until someone reads their lengths.

    Noting them starts no kernel and waits for nothing.
    """

    entries: list[_Entry] = field(default_factory=list)

    def add(
        self,
        *names: str,
        lengths_N: Tensor,
        keys_N: Tensor | None = None,
        kind: Kind = "rows",
        known_N: Tensor | None = None,
    ) -> None:
        """Note rows under each of the names, for positions as they are and for pairs with `_pairs` behind them.

        Args:
            names: of the counts.
            lengths_N: real positions of each row; mel frames where kind is "mel", a mask of words where it is "mask".
            keys_N: positions that each position of a row attends, where they are not those of the row.
            kind: "causal" rows attend what is before them; "mel" are encoded two by two within windows; of a "mask",
                words and one end a row are counted.
            known_N: rows that were not computed.
        """
        self.entries.append(_Entry(names, lengths_N, keys_N, kind, known_N))


def counts_of(works: Sequence[Work]) -> dict[str, float]:
    """Sums of positions and of pairs of query and key over everything noted. One host sync."""
    entries = [entry for work in works for entry in work.entries]
    if not entries:
        return {}
    sums_E2 = torch.stack([_sums(entry) for entry in entries]).tolist()  # host sync
    found: dict[str, float] = {}
    for entry, (positions, pairs) in zip(entries, sums_E2, strict=True):
        for name in entry.names:
            found[name] = found.get(name, 0.0) + positions
            found[f"{name}_pairs"] = found.get(f"{name}_pairs", 0.0) + pairs
    return found


def _sums(entry: _Entry) -> Tensor:
    """Positions and pairs, as float64."""
    mask = entry.kind == "mask"
    lengths_N = (entry.lengths_N.sum(1) + 1 if mask else entry.lengths_N).double()
    if entry.known_N is not None:
        lengths_N = lengths_N * (entry.known_N == 0)
    if entry.kind == "mel":
        lengths_N = ((lengths_N + 1) / 2).floor()
        whole_N = (lengths_N / WINDOW).floor()
        pairs_N = whole_N * WINDOW**2 + (lengths_N - whole_N * WINDOW) ** 2
    elif entry.kind == "causal":
        pairs_N = lengths_N * (lengths_N + 1) / 2
    else:
        pairs_N = lengths_N * (lengths_N if entry.keys_N is None else entry.keys_N.double())
    return torch.stack([lengths_N.sum(), pairs_N.sum()])
