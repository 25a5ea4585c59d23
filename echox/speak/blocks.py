"""Cuts a sequence that comes in pieces of any size into blocks at fixed places, each with its neighbours.

What is computed of a block is then the same, bit by bit, however the sequence came: arithmetic of another shape rounds
otherwise. It equals what is computed of the whole as far as a block's neighbours are all that reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Block(NamedTuple):
    """A window of a sequence: `items`, of which `own` are the block and the others its neighbours."""

    items: NDArray[Any]
    own: slice


class Blocks:
    """Blocks of `size` items with up to `around` neighbours on either side; fewer where the sequence ends.

    Args:
        size: items of a block.
        around: neighbours on either side.
    """

    def __init__(self, size: int, around: int) -> None:
        self._size, self._around = size, around
        self._held: NDArray[Any] = np.zeros(0, np.int64)
        self._before = 0

    def push(self, items: NDArray[Any]) -> Iterator[Block]:
        """The blocks whose neighbours are all there after more items."""
        self._held = np.concatenate([self._held, items.astype(np.int64)])
        while len(self._held) >= self._before + self._size + self._around:
            yield self._next()

    def close(self) -> Iterator[Block]:
        """The others."""
        while len(self._held) > self._before:
            yield self._next()

    def _next(self) -> Block:
        end = min(self._before + self._size, len(self._held))
        block = Block(self._held[: end + self._around], slice(self._before, end))
        self._held = self._held[max(0, end - self._around) :]
        self._before = min(self._around, end)
        return block


def joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Pieces of a waveform end to end."""
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
