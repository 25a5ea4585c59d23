"""Decides the order in which sources are read: as one union, epoch after epoch, or blended by weight without end.

Both are pure functions of (datasets, seed, epoch, window), and both know in closed form how far each source has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from echox.errors import DataError
from echox.stream.sampling.keyed_rng import permutation
from echox.stream.sampling.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

WeightBy = Literal["samples", "seconds", "tokens"]
_PARTS = 1 << 40
"""Resolution of a blend's rates: whole numbers, so that no machine rounds them differently."""


class SampleTable(NamedTuple):
    """Samples in some order, column by column.

    Attributes:
        source_N: index of the source.
        number_N: number of the sample in the source's catalogue.
        turn_N: which of the source's passes in the epoch, from 0.
        epoch_N: epoch of the union, or of the source in a blend.
    """

    source_N: NDArray[np.int64]
    number_N: NDArray[np.int64]
    turn_N: NDArray[np.int64]
    epoch_N: NDArray[np.int64]


class ReadingOrder(Protocol):
    """Which samples are in which window."""

    def windows(self, epoch: int) -> int | None:
        """Windows in an epoch; None if it does not end."""
        ...

    def pick(self, epoch: int, window: int) -> SampleTable:
        """The samples of one window, never none."""
        ...

    def cursors(self, epoch: int, window: int) -> list[dict[str, int]]:
        """How far each source has come at the start of a window: {"epoch", "samples" into that epoch}."""
        ...


class Union:
    """Every sample of every source `repeat` times an epoch, in windows of whole shards.

    Args:
        sources: what is read.
        seed: of the order.
        window_shards: most shards a window.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, window_shards: int) -> None:
        self._seed = seed
        columns: list[NDArray[np.int64]] = []
        for index, source in enumerate(sources):
            starts = source.shard_starts
            filled = np.flatnonzero(np.diff(starts))
            for turn in range(source.repeat):
                columns.append(
                    np.stack(
                        [
                            np.full(len(filled), index),
                            np.full(len(filled), turn),
                            starts[filled],
                            np.diff(starts)[filled],
                        ]
                    )
                )
        self._source, self._turn, self._first, self._size = np.concatenate(columns, axis=1)
        if not len(self._size):
            raise _nothing(sources)
        self._sources = sources
        self._windows = -(-len(self._size) // window_shards)
        self._order = lru_cache(2)(self._permuted)

    def windows(self, epoch: int) -> int | None:
        """The same in every epoch."""
        return self._windows

    def pick(self, epoch: int, window: int) -> SampleTable:
        """All samples of the window's shards."""
        shards = self._order(epoch)[self._edge(window) : self._edge(window + 1)]
        sizes = self._size[shards]
        numbers = np.concatenate(
            [np.arange(first, first + size) for first, size in zip(self._first[shards], sizes, strict=True)]
        )
        rows = SampleTable(
            np.repeat(self._source[shards], sizes),
            numbers,
            np.repeat(self._turn[shards], sizes),
            np.full(len(numbers), epoch, dtype=np.int64),
        )
        return _numbered(rows, self._sources)

    def cursors(self, epoch: int, window: int) -> list[dict[str, int]]:
        """Samples of each source in the windows before."""
        shards = self._order(epoch)[: self._edge(window)]
        taken = np.bincount(self._source[shards], weights=self._size[shards], minlength=len(self._sources))
        return [{"epoch": epoch, "samples": int(count)} for count in taken]

    def _edge(self, window: int) -> int:
        return window * len(self._size) // self._windows

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        return permutation(len(self._size), self._seed, "shards", epoch)


@dataclass(frozen=True)
class BlendVersion:
    """Weights of a blend and where they begin.

    Attributes:
        version: 1 for the first, one more for each change.
        window: first window they hold for.
        weights: as the recipe gave them.
        by: what they are shares of.
        rates: the same as whole numbers, in samples.
        cursors: samples taken of each source before `window`.
    """

    version: int
    window: int
    weights: tuple[float, ...]
    by: WeightBy
    rates: tuple[int, ...]
    cursors: tuple[int, ...]

    @classmethod
    def first(cls, sources: Sequence[Source], by: WeightBy) -> BlendVersion:
        """The recipe's weights, from the first window on."""
        weights = tuple(float(source.weight or 0.0) for source in sources)
        return cls(1, 0, weights, by, _rates(sources, weights, by), (0,) * len(sources))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BlendVersion:
        """Undo `to_json`."""
        lists = {name: tuple(record[name]) for name in ("weights", "rates", "cursors")}
        return cls(
            record["version"], record["window"], lists["weights"], record["by"], lists["rates"], lists["cursors"]
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def taken(self, window: int, window_samples: int) -> tuple[int, ...]:
        """Samples of each source before a window of this version."""
        quota = largest_remainder((window - self.window) * window_samples, self.rates)
        return tuple(before + more for before, more in zip(self.cursors, quota, strict=True))


class Blend:
    """Sources mixed by weight, each wrapping into epochs of its own, in windows of equally many samples.

    Args:
        sources: what is read.
        seed: of the order.
        window_samples: samples a window.
        versions: weights in force, oldest first.

    Raises:
        DataError: a source without samples, or one whose weight is less than a sample a window.
    """

    def __init__(
        self, sources: Sequence[Source], *, seed: int, window_samples: int, versions: Sequence[BlendVersion]
    ) -> None:
        self._sources = sources
        self._seed = seed
        self._window_samples = window_samples
        self.versions = tuple(versions)
        for source, rate in zip(sources, versions[-1].rates, strict=True):
            if not source.samples:
                raise _nothing([source])
            if rate * window_samples < sum(versions[-1].rates):
                raise DataError(
                    f"the weight of {source.path} is less than one sample in a window of {window_samples}",
                    where=source.catalogue.location,
                    fix="raise its weight or data.window_shards, or leave it out",
                )
        self._shards = lru_cache(2 * len(sources))(self._permuted)

    def windows(self, epoch: int) -> int | None:
        """A blend has no end."""
        return None

    def pick(self, epoch: int, window: int) -> SampleTable:
        """Each source's quota."""
        version = self._version(window)
        begin, end = (version.taken(at, self._window_samples) for at in (window, window + 1))
        parts = [
            part
            for index, (start, stop) in enumerate(zip(begin, end, strict=True))
            if start < stop
            for part in self._run(epoch, index, start, stop)
        ]
        rows = SampleTable(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return _numbered(rows, self._sources)

    def cursors(self, epoch: int, window: int) -> list[dict[str, int]]:
        """From the closed form."""
        taken = self._version(window).taken(window, self._window_samples)
        turns = [divmod(count, source.samples) for count, source in zip(taken, self._sources, strict=True)]
        return [{"epoch": turn, "samples": samples} for turn, samples in turns]

    def with_versions(self, versions: Sequence[BlendVersion]) -> Blend:
        """The same blend with the weights of an earlier part of the run."""
        return Blend(self._sources, seed=self._seed, window_samples=self._window_samples, versions=versions)

    def reweighted(self, window: int, weights: Sequence[float], by: WeightBy) -> Blend:
        """The blend that has other weights from a window on; windows before it stay as they are."""
        now = self._version(window)
        version = BlendVersion(
            version=now.version + 1,
            window=window,
            weights=tuple(weights),
            by=by,
            rates=_rates(self._sources, weights, by),
            cursors=now.taken(window, self._window_samples),
        )
        kept = [known for known in self.versions if known.window < window]
        return self.with_versions([*kept, version])

    def _version(self, window: int) -> BlendVersion:
        return next(version for version in reversed(self.versions) if version.window <= window)

    def _run(self, epoch: int, index: int, start: int, stop: int) -> list[SampleTable]:
        """Samples `start` to `stop` of one source's endless sequence."""
        size, parts = self._sources[index].samples, []
        for turn in range(start // size, -(-stop // size)):
            numbers = self._slice(epoch, index, turn, max(start - turn * size, 0), min(stop - turn * size, size))
            filled = [np.full(len(numbers), value, dtype=np.int64) for value in (index, 0, turn)]
            parts.append(SampleTable(filled[0], numbers, filled[1], filled[2]))
        return parts

    def _slice(self, epoch: int, index: int, turn: int, start: int, stop: int) -> NDArray[np.int64]:
        shards, ends = self._shards(epoch, index, turn)
        starts = self._sources[index].shard_starts
        found = []
        for position in range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop)) + 1):
            shard, end = int(shards[position]), int(ends[position])
            first, size = int(starts[shard]), int(starts[shard + 1] - starts[shard])
            order = permutation(size, self._seed, epoch, self._sources[index].key, turn, "samples", shard)
            found.append(first + order[max(start - (end - size), 0) : min(stop - (end - size), size)])
        return np.concatenate(found)

    def _permuted(self, epoch: int, index: int, turn: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sizes = np.diff(self._sources[index].shard_starts)
        filled = np.flatnonzero(sizes)
        shards = filled[permutation(len(filled), self._seed, epoch, self._sources[index].key, turn, "shards")]
        return shards, np.cumsum(sizes[shards])


def _numbered(rows: SampleTable, sources: Sequence[Source]) -> SampleTable:
    """Rows that count the samples that serve, with their numbers in the catalogues."""
    numbers = rows.number_N.copy()
    for index in np.unique(rows.source_N):
        here = rows.source_N == index
        numbers[here] = sources[index].numbers(rows.number_N[here])
    return rows._replace(number_N=numbers)


def largest_remainder(total: int, rates: Sequence[int]) -> list[int]:
    """Split `total` in proportion to whole-number rates: floors, and the largest remainders rounded up."""
    whole = sum(rates)
    shares = [divmod(total * rate, whole) for rate in rates]
    left = total - sum(floor for floor, _ in shares)
    up = set(sorted(range(len(rates)), key=lambda position: (-shares[position][1], position))[:left])
    return [floor + (position in up) for position, (floor, _) in enumerate(shares)]


def _rates(sources: Sequence[Source], weights: Sequence[float], by: WeightBy) -> tuple[int, ...]:
    """Weights as shares of samples: a share of seconds or tokens goes through the source's mean."""
    means = [1.0 if by == "samples" else _mean(source, by) for source in sources]
    rates = [weight / mean for weight, mean in zip(weights, means, strict=True)]
    return tuple(round(rate / sum(rates) * _PARTS) for rate in rates)


def _mean(source: Source, by: WeightBy) -> float:
    if not source.samples:
        raise _nothing([source])
    every = source.numbers()
    return float((source.seconds(every) if by == "seconds" else source.tokens(every)).mean())


def _nothing(sources: Sequence[Source]) -> DataError:
    return DataError(
        f"there is no sample in {', '.join(source.path for source in sources)}",
        where=", ".join(source.catalogue.location for source in sources),
        fix="build the corpus, or leave the source out of data.train",
    )
