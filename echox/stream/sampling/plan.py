"""Plans which samples make up each micro-batch of a run: a pure function of (datasets, seed, epoch, plan parameters).

An epoch is a sequence of windows, a window a sequence of optimizer steps, a step G micro-batches, G the same in all. A
step is named by its `StepAddress`; planning it takes its window alone, however far into the epoch it lies. World size
only decides which rank computes which of the G.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from echox.errors import RecipeError
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget, pack
from echox.stream.sampling.blend import Blend, BlendVersion, ReadingOrder, Union, WeightBy
from echox.stream.sampling.keyed_rng import mix64
from echox.stream.sampling.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.sampling.batching import SampleIndices

FORMAT = 1
"""Counted up when the same parameters would give another stream."""


class StepAddress(NamedTuple):
    """Address of an optimizer step: the next one to train."""

    epoch: int = 0
    window: int = 0
    step: int = 0


@dataclass(frozen=True)
class Window:
    """The planned samples of one window, and the steps made of them.

    Attributes:
        place: of its first step.
        source_N, number_N, turn_N, epoch_N: see `SampleTable`.
        length_N: what the budget counts.
        seconds_N, tokens_N: see `Source`.
        hash_N: identity of each visit: the sample, its epoch and its turn.
        steps: steps[s][g] are places of the samples of micro-batch g.
    """

    address: StepAddress
    source_N: NDArray[np.int64]
    number_N: NDArray[np.int64]
    turn_N: NDArray[np.int64]
    epoch_N: NDArray[np.int64]
    length_N: NDArray[np.float64]
    seconds_N: NDArray[np.float64]
    tokens_N: NDArray[np.float64]
    hash_N: NDArray[np.uint64]
    steps: list[list[SampleIndices]]

    def slots(self, step: int, rank: int, world_size: int) -> list[SampleIndices]:
        """The micro-batches of one rank: those at every `world_size`-th place, so that ranks run like costs at once.

        Raises:
            RecipeError: the world size does not divide the micro-batches of a step.
        """
        check_divides(len(self.steps[step]), world_size)
        return self.steps[step][rank::world_size]

    def samples(self, step: int) -> SampleIndices:
        """Places of all samples of one step."""
        return np.concatenate(self.steps[step])


class DatasetRecord(TypedDict):
    """A dataset of the plan: the recipe's name of it, its task, and the SHA-256 over its shards."""

    path: str
    task: str
    fingerprint: str


class Plan:
    """The stream of a run.

    Args:
        sources: all with a weight (a blend) or all without (a union).
        seed: of the order.
        budget: of a micro-batch and a step.
        window_shards: shards whose samples are shuffled together.
        pool: steps whose samples are sorted by length together; None is the whole window.
        weight_by: what the weights are shares of.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        budget: Budget,
        window_shards: int = 16,
        pool: int | None = None,
        weight_by: WeightBy = "samples",
    ) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self.budget = budget
        self.window_shards = window_shards
        self.pool = pool
        self.weight_by: WeightBy = weight_by
        self.order: ReadingOrder
        if self.blended:
            begin = [BlendVersion.first(self.sources, weight_by)]
            self.order = Blend(self.sources, seed=seed, window_samples=self._window_samples(), versions=begin)
        else:
            self.order = Union(self.sources, seed=seed, window_shards=window_shards)

    @property
    def blended(self) -> bool:
        """Whether the sources are mixed by weight."""
        return any(source.weight is not None for source in self.sources)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the union; over all sources once, for a blend."""
        return sum(source.samples * source.repeat for source in self.sources)

    def data(self) -> list[DatasetRecord]:
        """The datasets, in order; JSON types."""
        return [
            {"path": source.path, "task": source.task, "fingerprint": source.catalogue.fingerprint}
            for source in self.sources
        ]

    def parameters(self) -> dict[str, Any]:
        """Everything but datasets and seed that decides which samples make up a step; JSON types."""
        mixed: dict[str, Any] = (
            {"blend": True} if self.blended else {"repeat": [source.repeat for source in self.sources]}
        )
        return {
            "format": FORMAT,
            "window_shards": self.window_shards,
            "pool": self.pool,
            **mixed,
            **self.budget.identity(),
        }

    def digest(self) -> str:
        """Hash of the parameters."""
        return hashlib.sha256(json.dumps(self.parameters(), sort_keys=True).encode()).hexdigest()[:32]

    def window(self, epoch: int, window: int) -> Window:
        """Plan one window; the work is that of its own samples and, once an epoch, of permuting shards."""
        rows = self.order.pick(epoch, window)
        seconds, tokens = np.empty(len(rows.number_N)), np.empty(len(rows.number_N))
        keys = np.empty(len(rows.number_N), dtype=np.uint64)
        for index in np.unique(rows.source_N):
            source, here = self.sources[index], rows.source_N == index
            seconds[here], tokens[here] = source.seconds(rows.number_N[here]), source.tokens(rows.number_N[here])
            keys[here] = source.key
        by_tokens = isinstance(self.budget, CostBudget) and self.budget.by == "tokens"
        length_N = tokens if by_tokens else seconds
        return Window(
            address=StepAddress(epoch, window, 0),
            source_N=rows.source_N,
            number_N=rows.number_N,
            turn_N=rows.turn_N,
            epoch_N=rows.epoch_N,
            length_N=length_N,
            seconds_N=seconds,
            tokens_N=tokens,
            hash_N=visit_hash(keys, rows.epoch_N, rows.turn_N, rows.number_N),
            steps=pack(length_N, self.budget, pool=self.pool, key=(self.seed, epoch, window)),
        )

    def next_window(self, address: StepAddress) -> StepAddress:
        """First step of the window after that of `address`."""
        windows = self.order.windows(address.epoch)
        if windows is not None and address.window + 1 >= windows:
            return StepAddress(address.epoch + 1, 0, 0)
        return StepAddress(address.epoch, address.window + 1, 0)

    def following(self, address: StepAddress, steps: int) -> StepAddress:
        """The step after `address`, whose window has `steps` steps."""
        return address._replace(step=address.step + 1) if address.step + 1 < steps else self.next_window(address)

    def _window_samples(self) -> int:
        """Samples in a window of a blend: as many as its shards hold on average, and at least those of a step."""
        samples = sum(source.samples for source in self.sources)
        shards = sum(len(source.shard_starts) - 1 for source in self.sources)
        wanted = max(1, samples * self.window_shards // max(shards, 1))
        if isinstance(self.budget, SampleBudget):  # no step is left short
            return -(-wanted // self.budget.step) * self.budget.step
        return max(wanted, self.budget.micro_batches)


def visit_hash(
    keys_N: NDArray[np.uint64], epoch_N: NDArray[np.int64], turn_N: NDArray[np.int64], number_N: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """64-bit hash of (source, epoch, turn, sample): what exactly-once accounting adds up."""
    return mix64(keys_N, *(column.astype(np.uint64) for column in (epoch_N, turn_N, number_N)))


def check_divides(micro_batches: int, world_size: int) -> None:
    """Refuse a world size that would give ranks different numbers of micro-batches.

    Raises:
        RecipeError: naming both.
    """
    if micro_batches % world_size:
        raise RecipeError(
            f"a step has {micro_batches} micro-batches, which {world_size} processes cannot share evenly",
            fix=f"use a number of processes that divides {micro_batches}, or another number of micro-batches",
        )
