"""Groups samples into optimizer steps: micro-batches of like cost within a budget, the same number in every step.

Rows that are padded cost as much as the longest, so like lengths go together; rows that are packed cost what they hold,
so long and short ones are mixed until every micro-batch holds as much.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echox.stream.sampling.keyed_rng import permutation, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    SampleIndices = NDArray[np.int64]

JITTER = 0.02
"""Lengths are taken up to this share longer when they are sorted, so that neighbours differ from epoch to epoch."""
_HALVINGS = 8


class Budget(Protocol):
    """How much goes into a micro-batch and how many of those make a step."""

    @property
    def micro_batches(self) -> int:
        """G: micro-batches in every step, over all ranks."""
        ...

    def identity(self) -> dict[str, Any]:
        """What of it decides which samples make up a step; JSON types."""
        ...

    def pools(self, lengths_N: NDArray[np.float64], pool: int | None) -> list[int]:
        """Edges of the runs of samples that are sorted together, about `pool` steps each."""
        ...

    def cut(self, lengths_N: NDArray[np.float64]) -> list[list[SampleIndices]]:
        """Cut one pool, sorted from short to long, into steps of G micro-batches; some may be empty."""
        ...


@dataclass(frozen=True)
class SampleBudget:
    """A fixed number of samples a step.

    Steps of a window differ by one sample at most, and how a step is split does not decide what is in it.

    Attributes:
        step: samples a step, over all ranks.
        micro_batches: G.
        padded: a step is cut into runs of like lengths; otherwise it is distributed, so that all its micro-batches hold
            about as much and no rank waits for another.
    """

    step: int
    micro_batches: int
    padded: bool = True

    def identity(self) -> dict[str, Any]:
        """The samples of a step; their split is free."""
        return {"global_batch": self.step}

    def pools(self, lengths_N: NDArray[np.float64], pool: int | None) -> list[int]:
        """Edges at whole steps."""
        edges = _even(len(lengths_N), -(-len(lengths_N) // self.step))
        return _every(edges, pool)

    def cut(self, lengths_N: NDArray[np.float64]) -> list[list[SampleIndices]]:
        """Equally many samples in each, however long they are."""
        edges = _even(len(lengths_N), -(-len(lengths_N) // self.step))
        return [[start + share for share in self._shares(lengths_N[start:end])] for start, end in _spans(edges)]

    def _shares(self, lengths_N: NDArray[np.float64]) -> list[SampleIndices]:
        if not self.padded:
            return _deal(lengths_N, self.micro_batches)
        return [np.arange(start, end) for start, end in _spans(_even(len(lengths_N), self.micro_batches))]


@dataclass(frozen=True)
class CostBudget:
    """As many samples a micro-batch as its cost allows; one that is too long by itself is a micro-batch of its own.

    Attributes:
        by: what a length counts, "seconds" or "tokens".
        size: most a micro-batch may cost.
        micro_batches: G.
        padded: the cost is that of a padded batch, rows times the longest; otherwise the sum of the lengths.
    """

    by: str
    size: float
    micro_batches: int
    padded: bool = True

    def identity(self) -> dict[str, Any]:
        """All of it: another G or size makes other steps."""
        return {"by": self.by, "size": self.size, "micro_batches": self.micro_batches, "padded": self.padded}

    def pools(self, lengths_N: NDArray[np.float64], pool: int | None) -> list[int]:
        """Edges of equally many samples, by the steps that their summed length would fill."""
        if pool is None:
            return [0, len(lengths_N)]
        steps = -(-float(lengths_N.sum()) // (self.size * self.micro_batches))
        return _even(len(lengths_N), min(max(1, int(steps) // pool), len(lengths_N)))

    def cut(self, lengths_N: NDArray[np.float64]) -> list[list[SampleIndices]]:
        """Fill up greedily, under the smallest budget that needs no more steps than the full one."""
        lengths, group = lengths_N.tolist(), self.micro_batches
        edges = self._fill(lengths, self.size)
        wanted = -(-(len(edges) - 1) // group) * group
        low, high = min(sum(lengths) / wanted, self.size), self.size
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tried = self._fill(lengths, middle)
            if len(tried) - 1 <= wanted:
                edges, high = tried, middle
            else:
                low = middle
        spans = _split_up_to(_spans(edges), lengths, wanted)
        micro = [np.arange(start, end) for start, end in spans]
        micro += [np.arange(0)] * (wanted - len(micro))
        return [micro[first : first + group] for first in range(0, wanted, group)]

    def _fill(self, lengths: Sequence[float], size: float) -> list[int]:
        edges = [0]
        start, longest, total = 0, 0.0, 0.0
        for position, length in enumerate(lengths):
            longest, total = max(longest, length), total + length
            cost = (position + 1 - start) * longest if self.padded else total
            if cost > size and position > start:
                edges.append(position)
                start, longest, total = position, length, length
        return [*edges, len(lengths)]


def pack(
    lengths_N: NDArray[np.float64], budget: Budget, *, pool: int | None, key: Sequence[int | str]
) -> list[list[SampleIndices]]:
    """Steps of micro-batches of a window's samples; each sample is in exactly one micro-batch.

    Args:
        lengths_N: what a sample counts; sorts and, for a `CostBudget`, limits.
        budget: of a micro-batch and a step.
        pool: steps whose samples are sorted by length together; None sorts the whole window.
        key: of the random order.

    Returns:
        steps[s][g]: places of the samples in micro-batch g of step s, exactly `budget.micro_batches` a step, some of
        them empty where samples are few. Runs of like lengths go from short to long.
    """
    if not len(lengths_N):
        return []
    order = permutation(len(lengths_N), *key, "samples")
    blurred_N = lengths_N * (1 + JITTER * uniform(len(lengths_N), *key, "jitter"))
    steps: list[list[SampleIndices]] = []
    for start, end in _spans(budget.pools(lengths_N, pool)):
        indices = order[start:end]
        indices = indices[np.argsort(blurred_N[indices], kind="stable")]
        steps += [[indices[micro] for micro in step] for step in budget.cut(lengths_N[indices])]
    return [steps[position] for position in permutation(len(steps), *key, "steps")]


def padded_share(lengths_N: NDArray[np.float64], steps: Sequence[Sequence[SampleIndices]]) -> float:
    """Share of the padded micro-batches that is padding."""
    micro = [lengths_N[indices] for step in steps for indices in step if len(indices)]
    padded = sum(len(lengths) * float(lengths.max()) for lengths in micro)
    return 1 - sum(float(lengths.sum()) for lengths in micro) / padded


def straggler(lengths_N: NDArray[np.float64], steps: Sequence[Sequence[SampleIndices]], ranks: int) -> float:
    """How much longer the slowest rank takes than the mean, by padded cost: a mean over all micro-steps."""
    costs = np.array([[len(m) * lengths_N[m].max() if len(m) else 0.0 for m in step] for step in steps])
    by_rank = costs.reshape(len(steps), -1, ranks)
    return float(by_rank.max(2).sum() / by_rank.mean(2).sum())


def _deal(lengths_N: NDArray[np.float64], parts: int) -> list[SampleIndices]:
    """Distribute samples in rounds from the longest down, the longest of a round to the part that holds least."""
    held_P = np.zeros(parts)
    shares: list[list[int]] = [[] for _ in range(parts)]
    for end in range(len(lengths_N), 0, -parts):
        round_ = range(end - 1, max(end - parts, 0) - 1, -1)
        for position, part in zip(round_, np.argsort(held_P, kind="stable").tolist(), strict=False):
            shares[part].append(position)
            held_P[part] += lengths_N[position]
    return [np.array(share[::-1], dtype=np.int64) for share in shares]


def _even(count: int, parts: int) -> list[int]:
    """Edges of runs whose sizes differ by one at most."""
    return [part * count // parts for part in range(parts + 1)]


def _every(edges: list[int], stride: int | None) -> list[int]:
    parts = 1 if stride is None else -(-(len(edges) - 1) // stride)
    return [edges[position] for position in _even(len(edges) - 1, parts)]


def _spans(edges: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(edges[:-1], edges[1:], strict=True))


def _split_up_to(spans: list[tuple[int, int]], lengths: Sequence[float], wanted: int) -> Iterator[tuple[int, int]]:
    """Halve the costliest runs until there are as many as wanted, or none has two samples; in order."""
    heap = [(-(end - start) * lengths[end - 1], start, end) for start, end in spans]
    heapq.heapify(heap)
    single: list[tuple[int, int]] = []
    while heap and len(heap) + len(single) < wanted:
        _, start, end = heapq.heappop(heap)
        if end - start < 2:
            single.append((start, end))
            continue
        middle = (start + end) // 2
        for a, b in ((start, middle), (middle, end)):
            heapq.heappush(heap, (-(b - a) * lengths[b - 1], a, b))
    return iter(sorted([*single, *((start, end) for _, start, end in heap)]))
