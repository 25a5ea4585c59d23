"""Decodes the unit words of segments that are opened at different times, of any number of answers, in one static cache.

All rows stand at the same column of the cache. One that is opened later gets its text into the columns before it; what
a row sees, and where its words are said to be, does not depend on the column. So each decodes as if it were alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echox.models.greedy import BLOCK, DecodeStep, capacity
from echox.models.static_llama import StaticLlama
from echox.models.step_graph import StepGraph
from echox.models.t2c import T2CDecoder, TextPart

Key = TypeVar("Key", bound=Hashable)


class Said(NamedTuple, Generic[Key]):
    """What a segment said since one last looked.

    Attributes:
        key: of the segment.
        words: unit-language words, at most as many as it may have.
        ended: True at its end, False where it has said all it may without one; None while it goes on.
    """

    key: Key
    words: NDArray[np.int64]
    ended: bool | None


@dataclass
class _Row(Generic[Key]):
    """A row of the cache.

    Attributes:
        key: its segment; None once that is closed.
        first: column of its first text position.
        left: words that it may still say.
    """

    key: Key | None
    first: int
    left: int


class OpenSegments(Generic[Key]):
    """Greedy decoding of segments that come and go.

    Args:
        decoder: Echo decoder or teacher, in eval mode.
    """

    def __init__(self, decoder: T2CDecoder) -> None:
        self._decoder, self._body = decoder, StaticLlama(decoder.body)
        self._rows: list[_Row[Key]] = []
        self._step: DecodeStep | None = None
        self._run: StepGraph | None = None
        self._column = self._columns = 0

    def __len__(self) -> int:
        """How many are open."""
        return sum(row.key is not None for row in self._rows)

    @torch.no_grad()
    def open(self, keys: Sequence[Key], text: TextPart, limit_N: Tensor) -> None:
        """Read the texts of segments.

        Args:
            keys: one a segment, by which its words are known.
            text: text parts.
            limit_N: most words of each (U20); as the word after them, the end may still come.
        """
        asked = text.left_padded()
        length = asked.mask_BL.shape[1]
        sizes_N = asked.mask_BL.sum(1)
        limits = limit_N.clamp(max=self._decoder.max_positions - sizes_N).clamp(min=0)
        self._drop_closed()
        column = max(self._column - self._unused, length)
        ours, columns = column - self._column, capacity(column + BLOCK)
        step = self._decoder.begin(asked, text.starts_NS, capacity(length + BLOCK), body=self._body)
        step.resize(None, columns, column - length)
        if self._step is None:
            self._step = step
        else:
            self._move(None, columns, ours)
            self._step.take_in(step)
        sizes, most = torch.stack([sizes_N, limits]).tolist()  # host sync
        self._rows += [_Row(*row) for row in zip(keys, (column - size for size in sizes), most, strict=True)]
        self._column, self._columns = column, columns
        self._run = StepGraph(self._step, limit_N.device)

    def close(self, keys: set[Key]) -> None:
        """Forget segments, whether they have ended or not."""
        for row in self._rows:
            if row.key in keys:
                row.key = None
        self._drop_closed()

    @torch.no_grad()
    def run(self, steps: int = BLOCK) -> list[Said[Key]]:
        """Say up to `steps` words a segment, in the order in which they were opened; one host sync."""
        self._drop_closed()
        if self._step is None:
            return []
        self._make_room(steps)
        assert self._run is not None
        first = self._column
        for _ in range(steps):
            self._run()
            self._column += 1
            if self._step.words_NK.device.type == "cpu" and self._have_ended(first):
                break
        words_NB = self._step.words_NK[:, first : self._column].cpu().numpy()  # host sync
        said = [
            self._looked(row, words) for row, words in zip(self._rows, words_NB, strict=True) if row.key is not None
        ]
        self._drop_closed()
        return said

    def _have_ended(self, first: int) -> bool:
        """Whether every open segment has said its end since a column; a sync where there is a device to wait for."""
        assert self._step is not None
        ended_N = (self._step.words_NK[:, first : self._column] == self._decoder.end).any(1).numpy()
        return all(ended for ended, row in zip(ended_N, self._rows, strict=True) if row.key is not None)

    def _looked(self, row: _Row[Key], words: NDArray[np.int64]) -> Said[Key]:
        assert row.key is not None
        (ends,) = (words == self._decoder.end).nonzero()
        until = int(ends[0]) if len(ends) else len(words)
        ended = True if len(ends) and until <= row.left else False if len(words) > row.left else None
        said = Said(row.key, words[: min(until, row.left)], ended)
        row.left -= until
        if ended is not None:
            row.key = None
        return said

    @property
    def _unused(self) -> int:
        """First columns of the cache that no open row uses."""
        return min((row.first for row in self._rows if row.key is not None), default=0)

    def _make_room(self, steps: int) -> None:
        if self._column + steps > self._columns:
            unused = self._unused
            self._move(None, capacity(self._column - unused + steps), -unused)

    def _drop_closed(self) -> None:
        """Let closed rows leave when they are as many as the others; the cache leaves with the last one."""
        kept = [number for number, row in enumerate(self._rows) if row.key is not None]
        if not kept:
            self._rows, self._step, self._run, self._column, self._columns = [], None, None, 0, 0
        elif 2 * len(kept) <= len(self._rows):
            assert self._step is not None
            self._rows = [self._rows[number] for number in kept]
            self._move(torch.tensor(kept, device=self._step.words_NK.device), self._columns, 0)

    def _move(self, rows_n: Tensor | None, columns: int, left: int) -> None:
        assert self._step is not None
        self._step.resize(rows_n, columns, left)
        for row in self._rows:
            row.first += left
        self._column, self._columns = self._column + left, columns
        self._run = StepGraph(self._step, self._step.words_NK.device)
