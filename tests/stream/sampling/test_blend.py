"""Sources mixed by weight: what has been read of each, counted one by one, against shares and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from echox.errors import DataError
from echox.stream.sampling.blend import Blend, BlendVersion, SampleTable, WeightBy, largest_remainder
from echox.stream.sampling.source import Source
from tests.stream.datasets import sized

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 24
RESOLUTION = 1e-6
"""What rounding the rates to whole numbers may move in a few thousand samples."""


def three(weights: Sequence[float] = (1.0, 2.5, 0.5)) -> list[Source]:
    """Sources smaller and larger than their part of a window, one with empty shards."""
    shards = ([5, 7, 6], [0, 20, 1, 0, 30], [2, 1])
    return [sized(sizes, name=name, weight=weight) for sizes, name, weight in zip(shards, "abc", weights, strict=True)]


def blend(sources: Sequence[Source], by: WeightBy = "samples", window_samples: int = WINDOW, seed: int = 3) -> Blend:
    versions = [BlendVersion.first(sources, by)]
    return Blend(sources, seed=seed, window_samples=window_samples, versions=versions)


def counts(rows: SampleTable, sources: int) -> NDArray[np.int64]:
    return np.bincount(rows.source_N, minlength=sources)


def streams_of(mixed: Blend, windows: int, sources: int) -> list[tuple[list[int], list[int]]]:
    """Numbers and epochs of each source's samples, in the order of reading."""
    streams: list[tuple[list[int], list[int]]] = [([], []) for _ in range(sources)]
    for window in range(windows):
        rows = mixed.pick(0, window)
        for index, (numbers, epochs) in enumerate(streams):
            here = rows.source_N == index
            numbers += rows.number_N[here].tolist()
            epochs += rows.epoch_N[here].tolist()
    return streams


def assert_wraps(numbers: list[int], epochs: list[int], size: int) -> None:
    """Every epoch but the last, which may be under way, holds each sample once."""
    assert epochs == [place // size for place in range(len(numbers))]
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        assert len(set(part)) == len(part)
        assert len(part) < size or sorted(part) == list(range(size))


def exact_share(sources: Sequence[Source], by: WeightBy) -> list[Fraction]:
    """Share of the samples that each source must have, from its weight and the mean of its lengths, one by one."""
    rates = []
    for source in sources:
        size = source.catalogue.samples
        if by == "samples":
            mean = Fraction(1)
        else:
            lengths = source.seconds(slice(0, size)) if by == "seconds" else source.tokens(slice(0, size))
            mean = sum(map(Fraction, lengths.tolist()), Fraction(0)) / size
        rates.append(Fraction(source.weight or 0.0) / mean)
    return [rate / sum(rates) for rate in rates]


@pytest.mark.parametrize("by", ["samples", "seconds", "tokens"])
def test_each_source_is_within_a_sample_of_its_share_at_every_window(by: WeightBy) -> None:
    sources = three()
    mixed, shares = blend(sources, by), exact_share(sources, by)
    so_far = np.zeros(3, dtype=np.int64)
    for window in range(80):
        cursors = [
            cursor["epoch"] * s.catalogue.samples + cursor["samples"]
            for cursor, s in zip(mixed.cursors(0, window), sources, strict=True)
        ]
        assert cursors == so_far.tolist()
        rows = mixed.pick(0, window)
        assert len(rows.number_N) == WINDOW
        so_far += counts(rows, 3)
        wanted = [float(share * WINDOW * (window + 1)) for share in shares]
        assert np.all(np.abs(so_far - wanted) < 1 + RESOLUTION), (window, so_far, wanted)


def test_weights_by_seconds_are_shares_of_the_audio() -> None:
    sources = three((1.0, 3.0, 2.0))
    mixed = blend(sources, "seconds", window_samples=60)
    heard = np.zeros(3)
    for window in range(60):
        rows = mixed.pick(0, window)
        for index, source in enumerate(sources):
            heard[index] += source.seconds(rows.number_N[rows.source_N == index]).sum()
    assert heard / heard.sum() == pytest.approx([1 / 6, 3 / 6, 2 / 6], rel=0.02)


def test_random_blends_never_take_a_sample_back() -> None:
    for case in range(60):
        rng = np.random.default_rng(case)
        weights = rng.lognormal(0, 0.5, rng.integers(1, 6))
        smallest = int(np.ceil(weights.sum() / weights.min()))
        sources = [
            sized(rng.integers(0, 9, 4).tolist() + [1], name=f"{case}-{index}", weight=float(weight))
            for index, weight in enumerate(weights)
        ]
        mixed = blend(sources, window_samples=smallest + int(rng.integers(0, 3)), seed=case)
        for stream, source in zip(streams_of(mixed, 12, len(sources)), sources, strict=True):
            assert_wraps(*stream, source.catalogue.samples)


def test_each_source_wraps_alone_and_each_of_its_epochs_holds_every_sample_once() -> None:
    sources = three()
    mixed = blend(sources)
    wraps = []
    for (numbers, epochs), source in zip(streams_of(mixed, 40, 3), sources, strict=True):
        assert_wraps(numbers, epochs, source.catalogue.samples)
        wraps.append(epochs[-1])
    assert wraps == [13, 11, 39]


def orders_of(seed: int, epoch: int, turn: int) -> tuple[list[int], list[list[int]]]:
    """Order of the shards of a source of eight shards by five samples, and of the samples in each shard by number."""
    alone = [sized([5] * 8, name="d", weight=1.0)]
    numbers = blend(alone, window_samples=40, seed=seed).pick(epoch, turn).number_N.reshape(8, 5)
    shards = (numbers[:, 0] // 5).tolist()
    return shards, [(numbers[shards.index(shard)] % 5).tolist() for shard in range(8)]


def test_another_seed_epoch_of_the_run_or_turn_of_the_source_gives_another_order_of_shards_and_of_samples() -> None:
    orders = [orders_of(seed, epoch, turn) for seed in (1, 2) for epoch in (0, 1) for turn in (0, 1)]
    for part in (0, 1):
        assert len({str(order[part]) for order in orders}) == len(orders) == 8


def test_each_shard_has_an_order_of_its_own() -> None:
    _, within = orders_of(0, 0, 0)
    assert len({tuple(order) for order in within}) > 4


def test_shards_are_read_one_after_the_other() -> None:
    sources = three()
    numbers, _ = streams_of(blend(sources), 10, 3)[0]
    shard_of = np.repeat([0, 1, 2], [5, 7, 6])
    first_epoch = shard_of[numbers[:18]].tolist()
    assert sum(left != right for left, right in zip(first_epoch[:-1], first_epoch[1:], strict=True)) == 2


def test_a_window_planned_alone_is_the_one_planned_in_sequence() -> None:
    sequence = blend(three())
    in_order = [sequence.pick(0, window) for window in range(30)]
    for window in [29, 0, 17, 3]:
        for left, right in zip(blend(three()).pick(0, window), in_order[window], strict=True):
            assert left.tolist() == right.tolist()


def test_a_blend_has_no_end() -> None:
    assert blend(three()).windows(0) is None
    assert len(blend(three()).pick(0, 10**9).number_N) == WINDOW


def test_new_weights_leave_earlier_windows_and_go_on_from_the_cursors() -> None:
    sources = three((1.0, 1.0, 1.0))
    before = blend(sources)
    after = before.reweighted(11, (1.0, 4.0, 1.0), "samples")
    for window in range(11):
        assert after.pick(0, window).number_N.tolist() == before.pick(0, window).number_N.tolist()
    later = sum(counts(after.pick(0, window), 3) for window in range(11, 21))
    assert later == pytest.approx([40, 160, 40], abs=1)
    for stream, source in zip(streams_of(after, 40, 3), sources, strict=True):
        assert_wraps(*stream, source.catalogue.samples)


def test_versions_survive_their_record() -> None:
    sources = three()
    changed = blend(sources).reweighted(4, (3.0, 1.0, 1.0), "seconds").reweighted(9, (1.0, 1.0, 1.0), "tokens")
    restored = blend(sources).with_versions([BlendVersion.from_json(v.to_json()) for v in changed.versions])
    assert [(version.version, version.window, version.by) for version in restored.versions] == [
        (1, 0, "samples"),
        (2, 4, "seconds"),
        (3, 9, "tokens"),
    ]
    for window in range(15):
        assert restored.pick(0, window).number_N.tolist() == changed.pick(0, window).number_N.tolist()


def test_weights_changed_twice_before_a_window_begins_are_one_change() -> None:
    mixed = blend(three()).reweighted(4, (3.0, 1.0, 1.0), "samples").reweighted(4, (1.0, 5.0, 1.0), "samples")
    assert [(version.window, version.weights) for version in mixed.versions] == [
        (0, (1.0, 2.5, 0.5)),
        (4, (1.0, 5.0, 1.0)),
    ]


def test_a_weight_of_less_than_a_sample_a_window_is_refused() -> None:
    blend(three((WINDOW - 2.0, 1.0, 1.0)))
    with pytest.raises(DataError, match="the weight of b is less than one sample in a window of 24") as caught:
        blend(three((WINDOW - 1.0, 0.9, 1.0)))
    assert caught.value.where == "/data/b"
    with pytest.raises(DataError, match="the weight of c is less than one sample"):
        blend(three()).reweighted(5, (10.0, 10.0, 0.1), "samples")


@pytest.mark.parametrize("by", ["samples", "seconds"])
def test_a_source_without_samples_is_refused(by: WeightBy) -> None:
    sources = [*three()[:2], sized([0, 0], name="empty", weight=1.0)]
    with pytest.raises(DataError, match="there is no sample in empty") as caught:
        blend(sources, by)
    assert caught.value.where == "/data/empty"


def test_largest_remainder_is_the_nearest_split_into_whole_numbers() -> None:
    for case in range(200):
        rng = np.random.default_rng(case)
        rates = rng.integers(0, 20, rng.integers(1, 5)).tolist()
        rates[0] += 1
        total = int(rng.integers(0, 12))
        exact = [Fraction(total * rate, sum(rates)) for rate in rates]

        def distance(split: Sequence[int], exact: Sequence[Fraction] = exact) -> Fraction:
            return sum((abs(part - share) for part, share in zip(split, exact, strict=True)), Fraction(0))

        nearest = min(distance(split) for split in product(range(total + 1), repeat=len(rates)) if sum(split) == total)
        found = largest_remainder(total, rates)
        assert sum(found) == total and distance(found) == nearest


def test_largest_remainder_gives_the_earlier_source_what_two_could_have() -> None:
    assert largest_remainder(1, [1, 1, 1]) == [1, 0, 0]
    assert largest_remainder(5, [1, 1, 1]) == [2, 2, 1]


def test_largest_remainder_is_exact_where_floats_are_not() -> None:
    rates = [(1 << 40) - 1, 1]
    assert largest_remainder(10**15, rates) == [10**15 - 909, 909]
