"""Counts and looks up 64-bit integer keys by whole-array operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

# 2^64 divided by the golden ratio: spreads consecutive keys over the table (Knuth, multiplicative hashing).
_SPREAD = np.uint64(11400714819323198485)


class KeyTable:
    """An immutable map from distinct non-negative int64 keys to numbers: open addressing, at most a quarter full.

    Args:
        keys: distinct; [N].
        values: one a key; [N].
    """

    def __init__(self, keys: Ints, values: NDArray[Any]) -> None:
        bits = max(4, int(np.ceil(np.log2(4 * len(keys) + 1))))
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._keys = np.full(1 << bits, -1, dtype=np.int64)
        self._values = np.zeros(1 << bits, dtype=values.dtype)
        slot = self._slot(keys)
        pending = np.arange(len(keys))
        while len(pending):
            free = self._keys[slot[pending]] == -1
            # Of several keys that want the same free slot, the last one written has it; the others move on.
            self._keys[slot[pending[free]]] = keys[pending[free]]
            pending = pending[self._keys[slot[pending]] != keys[pending]]
            slot[pending] = (slot[pending] + 1) & self._mask
        self._values[slot] = values

    def _slot(self, keys: Ints) -> Ints:
        slots: Ints = ((keys.astype(np.uint64) * _SPREAD) >> self._shift).astype(np.int64)
        return slots

    def get(self, keys: Ints) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Value of each key, 0 where it is absent, and whether it is there."""
        slot = self._slot(keys)
        pending = np.arange(len(keys))
        while len(pending):
            here = self._keys[slot[pending]]
            pending = pending[(here != keys[pending]) & (here != -1)]
            slot[pending] = (slot[pending] + 1) & self._mask
        found = self._keys[slot] == keys
        return np.where(found, self._values[slot], 0), found


def count_keys(keys: Ints) -> tuple[Ints, Ints]:
    """Distinct keys in increasing order and how often each occurs."""
    distinct, counts = np.unique(keys, return_counts=True)
    return distinct, counts.astype(np.int64)


def merge_counts(keys: Ints, counts: Ints, more_keys: Ints, more_counts: Ints) -> tuple[Ints, Ints]:
    """Sum of two results of `count_keys`."""
    distinct, index = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    totals = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(totals, index, np.concatenate([counts, more_counts]))
    return distinct, totals
