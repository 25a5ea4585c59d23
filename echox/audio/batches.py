"""Groups clips of similar length into batches, so that little of a padded batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def length_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the places of clips from the shortest on, in batches of at most `most` padded samples.

    A clip longer than that is a batch of its own.
    """
    batch: list[int] = []
    for clip in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[clip] > most:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch
