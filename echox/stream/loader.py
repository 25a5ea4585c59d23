"""Micro-batches of one rank, read ahead in threads; their order is the plan's, whatever the threads do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from echox.stream.collate import Collate, Item
from echox.stream.plan import global_batch, micro_batches


class TrainLoader:
    """The rank's training data as a pure function of the optimizer step.

    Args:
        items: every sample of one epoch, repeats included.
        collate: items and step to a micro-batch.
        seed: of the order.
        batch: samples in one optimizer step over all ranks.
        micro_batch: samples in one micro-batch.
        rank, world_size: of this process.
        threads: decoding threads.
        prefetch: micro-batches read ahead.
    """

    def __init__(
        self,
        items: Sequence[Item],
        collate: Collate,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        threads: int,
        prefetch: int,
    ) -> None:
        self._items = items
        self._lengths = [length_s(item) for item in items]
        self._collate = collate
        self._seed = seed
        self._batch = batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._ahead = max(1, -(-prefetch * micro_batch * world_size // batch))
        self._pending: dict[int, list[Future[Any]]] = {}

    def step(self, step: int) -> list[Any]:
        """The rank's micro-batches of one optimizer step; the next steps start reading in the background."""
        for stale in [known for known in self._pending if not step <= known <= step + self._ahead]:
            for future in self._pending.pop(stale):
                future.cancel()
        for wanted in range(step, step + self._ahead + 1):
            if wanted not in self._pending:
                self._pending[wanted] = self._submit(wanted)
        return [future.result() for future in self._pending.pop(step)]

    def _submit(self, step: int) -> list[Future[Any]]:
        chosen = global_batch(len(self._items), self._seed, step, self._batch)
        groups = micro_batches(chosen, self._lengths, self._micro_batch, self._rank, self._world_size)
        return [self._pool.submit(self._collate, [self._items[i] for i in group], step) for group in groups]


class ValidLoader:
    """A fixed pass over a source: the same number of micro-batches on every rank, padded by rows of weight zero."""

    def __init__(
        self, items: Sequence[Item], collate: Collate, *, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self._collate = collate
        ordered = sorted(items, key=length_s)
        short = -len(ordered) % (micro_batch * world_size)
        ordered += [Item(ordered[-1].sample, ordered[-1].task, 0.0)] * short
        groups = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
        self._groups = groups[rank::world_size]

    def __iter__(self) -> Iterator[Any]:
        """Yield the rank's micro-batches."""
        for group in self._groups:
            yield self._collate(group, -1)


def length_s(item: Item) -> float:
    """Seconds of the audio that decides the item's cost."""
    meta = item.sample.meta
    return float(meta.get("question_s") or meta.get("answer_s") or 0.0)
