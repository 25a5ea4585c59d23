"""Which samples make up optimizer step s: a pure function of (samples, seed, s), the same on every rank.

The samples of all epochs form one endless sequence, cut into global batches, so no sample is dropped or repeated within
an epoch; a batch may straddle two epochs. World size only decides which rank computes which micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of one epoch from a counter-based generator: [samples] int64."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), epoch])).permutation(samples)


def global_batch(samples: int, seed: int, step: int, size: int) -> list[int]:
    """Sample numbers of one optimizer step, in sequence order."""
    first = step * size
    epochs = range(first // samples, (first + size - 1) // samples + 1)
    orders = {epoch: epoch_order(samples, seed, epoch) for epoch in epochs}
    return [int(orders[place // samples][place % samples]) for place in range(first, first + size)]


def micro_batches(
    batch: Sequence[int], lengths: Sequence[float], micro_batch: int, rank: int, world_size: int
) -> list[list[int]]:
    """The rank's micro-batches of one step: neighbours in length share a micro-batch, ranks get similar lengths.

    Micro-batch k of rank r is group k * world_size + r of the length-sorted step.
    """
    ordered = sorted(batch, key=lambda sample: (lengths[sample], sample))
    groups = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
    return groups[rank::world_size]
