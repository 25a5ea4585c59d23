"""Reads the questions of a dataset in batches of like length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from echox.errors import CorruptSampleError
from echox.responses.decoding import DAMAGED, NO_USE
from echox.responses.table import Answer
from echox.stream.collate import Item

if TYPE_CHECKING:
    from echox.stream.batch import SpeechBatch
    from echox.stream.collate import SpeechCollate
    from echox.stream.sampling.source import Source
    from echox.stream.storage.store import ShardStore

_AHEAD = 2


def longest_first(source: Source) -> list[int]:
    """Numbers of all samples, those with the longest questions first: what memory cannot hold fails at once."""
    seconds_N = source.seconds(slice(0, source.catalogue.samples))
    numbers: list[int] = np.argsort(-seconds_N, kind="stable").tolist()
    return numbers


def read_batch(
    source: Source, store: ShardStore, collate: SpeechCollate, numbers: Iterable[int]
) -> tuple[SpeechBatch | None, list[Answer]]:
    """A batch of the samples of these numbers, None without any; and those that cannot be read, as rejected answers."""
    rows, damaged = [], []
    for number in numbers:
        if not source.serves(number):
            key, text = source.catalogue.key(number), f"of no use for task {source.task}"
            damaged.append(Answer(number=number, id=key, tokens=[], text=text, rejected=NO_USE))
            continue
        try:
            sample = store.read(number, collate.members)
            rows.append(collate.decode(Item(sample, source.task, source=source.key)))
        except CorruptSampleError as error:  # the training leaves it out as well
            key = source.catalogue.key(number)
            damaged.append(Answer(number=number, id=key, tokens=[], text=error.what, rejected=DAMAGED))
    return collate.join(rows, -1) if rows else None, damaged


def read_ahead(
    source: Source, store: ShardStore, collate: SpeechCollate, batches: Sequence[list[int]]
) -> Iterator[tuple[SpeechBatch | None, list[Answer]]]:
    """`read_batch` of each, a few batches ahead of their use."""
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="respond") as pool:
        ahead: deque[Future[tuple[SpeechBatch | None, list[Answer]]]] = deque()
        for numbers in batches:
            ahead.append(pool.submit(read_batch, source, store, collate, numbers))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
