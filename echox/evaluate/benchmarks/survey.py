"""Looks through a benchmark before anything is answered: every question is decoded once, and all of them hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from echox.audio.io import SAMPLE_RATE
from echox.errors import DataError
from echox.evaluate.benchmarks.catalogue import default_place, how_to_get
from echox.evaluate.benchmarks.questions import Question
from echox.evaluate.benchmarks.readers import read_questions


@dataclass(frozen=True)
class Item:
    """A question without its sound: what scores and page need of it.

    Attributes:
        id, text, golds: see `Question`.
        seconds: of its audio.
    """

    id: str
    text: str
    golds: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that can be read to its end.

    Attributes:
        name: by which it was asked for.
        place: its folder or file.
        limit: most questions; None for all.
        items: by the number of the question.
        sha256: of all questions with their audio.
    """

    name: str
    place: Path
    limit: int | None
    items: tuple[Item, ...]
    sha256: str

    def batches(self, size: int) -> Iterator[list[Question]]:
        """The questions again, with their sounds, so many at a time; the last may be shorter."""
        batch: list[Question] = []
        for question in read_questions(self.place, self.limit):
            batch.append(question)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def survey(
    name: str, place: Path | None, limit: int | None, progress: Callable[[int], None] | None = None
) -> Benchmark:
    """Find a benchmark and look at all of its questions.

    Args:
        name: one of the catalogue, or any other with a place.
        place: its folder or file; None looks below the cache.
        limit: most questions.
        progress: called with questions read.

    Raises:
        DataError: it is not there, or one of its questions cannot be used.
    """
    found = place or default_place(name)
    if not found.exists():
        raise DataError(f"benchmark {name} was not found", where=str(found), fix=how_to_get(name))
    items: list[Item] = []
    whole = hashlib.sha256()
    for question in read_questions(found, limit):
        seconds = len(question.audio()) / SAMPLE_RATE
        items.append(Item(question.id, question.text, question.golds, round(seconds, 3)))
        whole.update(question.digest())
        if progress:
            progress(len(items))
    return Benchmark(name, found, limit, tuple(items), whole.hexdigest())


def batch_numbers(count: int, size: int) -> list[Sequence[int]]:
    """The numbers of the questions of each batch."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
