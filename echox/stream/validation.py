"""Reads a held-out dataset in a fixed pass, the same number of micro-batches on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.stream.sampling.batching import Budget

if TYPE_CHECKING:
    from echox.stream.collate import Collate
    from echox.stream.sampling.batching import SampleIndices
    from echox.stream.sampling.source import Source
    from echox.stream.storage.store import ShardStore


class ValidReader:
    """Every sample of a source once, from short to long; ranks that run out of samples get blank batches.

    Scores are compared between runs, so a damaged sample is an error here and not left out.

    Args:
        source: the dataset.
        store: where its samples are read.
        collate: samples to a batch.
        budget: of a micro-batch.
        by_tokens: whether a sample counts in tokens, otherwise in seconds.
        rank, world_size: of this process.
        threads: that read and decode.
        prefetch: micro-batches read ahead.
        pin: leave batches where a GPU copies them from by itself.
    """

    def __init__(
        self,
        source: Source,
        store: ShardStore,
        collate: Collate[Any, Any],
        budget: Budget,
        *,
        by_tokens: bool,
        rank: int,
        world_size: int,
        threads: int,
        prefetch: int,
        pin: bool = False,
    ) -> None:
        self._pin = pin
        self._source, self._store, self._collate = source, store, collate
        self._threads, self._prefetch = threads, max(1, prefetch)
        numbers = source.numbers()
        lengths_N = source.tokens(numbers) if by_tokens else source.seconds(numbers)
        order = np.argsort(lengths_N, kind="stable").astype(np.int64)
        cut = budget.cut(lengths_N[order]) if len(order) else []
        micro = [numbers[order[indices]] for step in cut for indices in step if len(indices)]
        micro += [order[:0]] * (-len(micro) % world_size)
        self._micro: list[SampleIndices] = micro[rank::world_size]

    def __iter__(self) -> Iterator[Any]:
        """Yield the rank's micro-batches.

        Raises:
            CorruptSampleError: a sample is damaged.
            TransientReadError: storage failed again and again.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="valid") as pool:
            ahead: deque[Future[Any]] = deque()
            for indices in self._micro:
                ahead.append(pool.submit(self._read, indices))
                if len(ahead) > self._prefetch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _read(self, indices: SampleIndices) -> Any:
        from echox.stream.collate import Item

        read = (self._store.read(number, self._collate.members) for number in indices.tolist())
        rows = [self._collate.decode(Item(sample, self._source.task, source=self._source.key)) for sample in read]
        batch = self._collate.join(rows, -1) if rows else self._collate.blank(-1)
        return batch.pinned() if self._pin else batch
