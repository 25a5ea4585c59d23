"""Samples to micro-batches, over random lengths: nothing lost, nothing over budget, little padding, even ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from echox.stream.sampling.batching import JITTER, Budget, CostBudget, SampleBudget, pack, padded_share, straggler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.sampling.batching import SampleIndices

ROUNDING = 1 + 1e-9
WORLD_SIZES = (2, 4, 8)


def lognormal(count: int, seed: int = 0) -> NDArray[np.float64]:
    """Lengths that spread as those of utterances do."""
    return np.random.default_rng(seed).lognormal(1.2, 0.6, count)


def cost_cases(cases: int) -> Iterator[tuple[NDArray[np.float64], CostBudget, int | None]]:
    """Random lengths, budgets from less than any of them to more than all, and pools."""
    for case in range(cases):
        rng = np.random.default_rng(case)
        size = float(rng.choice([0.5, 2, 6, 20, 60, 1000]))
        budget = CostBudget("seconds", size, int(rng.integers(1, 9)), padded=bool(rng.integers(2)))
        yield lognormal(int(rng.integers(1, 150)), case), budget, int(rng.integers(1, 6)) if rng.integers(2) else None


def sample_cases(cases: int) -> Iterator[tuple[NDArray[np.float64], SampleBudget, int | None]]:
    for case in range(cases):
        rng = np.random.default_rng(case)
        budget = SampleBudget(int(rng.integers(1, 40)), int(rng.integers(1, 9)), padded=bool(rng.integers(2)))
        yield lognormal(int(rng.integers(1, 200)), case), budget, int(rng.integers(1, 6)) if rng.integers(2) else None


def all_cases(cases: int) -> Iterator[tuple[NDArray[np.float64], Budget, int | None]]:
    """As many of both kinds."""
    yield from cost_cases(cases)
    yield from sample_cases(cases)


def cost(lengths: list[float], budget: CostBudget) -> float:
    return len(lengths) * max(lengths) if budget.padded else sum(lengths)


def micro_lengths(lengths_N: NDArray[np.float64], steps: list[list[SampleIndices]]) -> list[list[float]]:
    return [[float(lengths_N[place]) for place in micro] for step in steps for micro in step if len(micro)]


def members_of(steps: list[list[SampleIndices]]) -> list[list[int]]:
    """Which samples share a step, whatever their order in it."""
    return [sorted(np.concatenate(step).tolist()) for step in steps]


def useful_share(lengths_N: NDArray[np.float64], steps: list[list[SampleIndices]]) -> float:
    """Filled over all cells of the padded rectangles, summed one by one."""
    micro = micro_lengths(lengths_N, steps)
    return sum(sum(lengths) for lengths in micro) / sum(len(lengths) * max(lengths) for lengths in micro)


def shuffled(lengths_N: NDArray[np.float64], *, micro_batches: int, step: int) -> list[list[SampleIndices]]:
    """Steps of equally many samples in no order."""
    order = np.random.default_rng(0).permutation(len(lengths_N))
    whole = order[: len(order) // step * step].reshape(-1, micro_batches, step // micro_batches)
    return [list(groups) for groups in whole]


def test_no_sample_is_lost_or_doubled_and_every_step_has_its_micro_batches() -> None:
    for case, (lengths, budget, pool) in enumerate(all_cases(150)):
        steps = pack(lengths, budget, pool=pool, key=(case,))
        places = [int(place) for step in steps for micro in step for place in micro]
        assert sorted(places) == list(range(len(lengths))), (budget, pool)
        assert {len(step) for step in steps} == {budget.micro_batches}
        assert all(any(len(micro) for micro in step) for step in steps)


def test_no_samples_are_no_steps() -> None:
    for budget in (SampleBudget(8, 2), CostBudget("seconds", 10, 2)):
        assert pack(lognormal(0), budget, pool=None, key=(0,)) == []


def test_only_a_sample_by_itself_exceeds_the_budget() -> None:
    alone = 0
    for lengths, budget, pool in cost_cases(200):
        for micro in micro_lengths(lengths, pack(lengths, budget, pool=pool, key=(1,))):
            alone += len(micro) == 1 and cost(micro, budget) > budget.size
            assert len(micro) == 1 or cost(micro, budget) <= budget.size * ROUNDING, (budget, pool, micro)
    assert alone > 100


def test_a_few_samples_longer_than_the_budget_let_no_other_exceed_it() -> None:
    lengths = np.array([1.0] * 20 + [500.0, 900.0])
    for padded in (True, False):
        budget = CostBudget("seconds", 4.0, 2, padded)
        found = micro_lengths(lengths, pack(lengths, budget, pool=None, key=(0,)))
        assert [500.0] in found and [900.0] in found
        assert max(map(len, found)) == 4


def test_steps_of_a_sample_budget_differ_by_one_sample_and_are_as_few_as_can_be() -> None:
    for lengths, budget, pool in sample_cases(400):
        sizes = [sum(map(len, step)) for step in pack(lengths, budget, pool=pool, key=(2,))]
        assert max(sizes) <= budget.step and max(sizes) - min(sizes) <= 1, (budget, pool, sizes)
        assert len(sizes) == -(-len(lengths) // budget.step)


def test_micro_batches_of_a_sample_budget_differ_by_one_sample_within_a_step() -> None:
    for lengths, budget, pool in sample_cases(200):
        for step in pack(lengths, budget, pool=pool, key=(3,)):
            sizes = [len(micro) for micro in step]
            assert max(sizes) - min(sizes) <= 1


def test_a_step_of_a_sample_budget_does_not_depend_on_its_split() -> None:
    for lengths, budget, pool in sample_cases(100):
        budgets = [SampleBudget(budget.step, group, padded) for group in (1, 2, 3, 24) for padded in (True, False)]
        contents = [members_of(pack(lengths, split, pool=pool, key=(4,))) for split in budgets]
        assert all(content == contents[0] for content in contents)


def test_micro_batches_go_from_short_to_long_unless_they_are_dealt_out() -> None:
    for lengths, budget, pool in all_cases(75):
        if isinstance(budget, SampleBudget) and not budget.padded:
            continue
        for step in pack(lengths, budget, pool=pool, key=(5,)):
            filled = [lengths[micro] for micro in step if len(micro)]
            assert all(left.max() <= right.min() * (1 + JITTER) for left, right in pairwise(filled))


def test_emptied_micro_batches_are_at_the_end_of_a_step_that_has_too_few_samples() -> None:
    emptied = 0
    for lengths, budget, _ in cost_cases(250):
        steps = pack(lengths, budget, pool=None, key=(6,))
        sizes = [[len(micro) for micro in step] for step in steps]
        with_empty = [step for step in sizes if 0 in step]
        assert len(with_empty) <= 1
        for step in with_empty:
            assert step == sorted(step, reverse=True) and max(map(max, sizes)) == 1
            emptied += 1
    assert emptied > 20


def test_the_pool_is_what_is_sorted_together() -> None:
    lengths = lognormal(1200)
    spread = {
        pool: np.ptp([np.mean(lengths[np.concatenate(step)]) for step in pack(lengths, budget, pool=pool, key=(7,))])
        for budget in [SampleBudget(60, 6)]
        for pool in (1, 4, None)
    }
    assert spread[1] < spread[4] < spread[None]
    one = pack(lengths, SampleBudget(60, 6), pool=1, key=(7,))
    assert all(abs(np.mean(lengths[np.concatenate(step)]) - lengths.mean()) < 1.2 for step in one)


def test_who_shares_a_pool_is_drawn_and_does_not_depend_on_lengths() -> None:
    drawn = [
        members_of(pack(lognormal(50, seed), SampleBudget(10, 1), pool=1, key=key))
        for seed, key in ((0, (8,)), (1, (8,)), (0, (9,)))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(max(step) - min(step) > 20 for step in drawn[0])


def test_steps_come_in_no_order_of_length() -> None:
    lengths = lognormal(1200)
    for budget in (SampleBudget(30, 6), CostBudget("seconds", 20.0, 6)):
        means = [lengths[np.concatenate(step)].mean() for step in pack(lengths, budget, pool=None, key=(13,))]
        assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_neighbours_differ_from_epoch_to_epoch() -> None:
    lengths = lognormal(600)
    epochs = [pack(lengths, SampleBudget(60, 6), pool=None, key=(9, epoch, 0)) for epoch in (0, 1)]
    groups = [{frozenset(micro.tolist()) for step in steps for micro in step} for steps in epochs]
    assert len(groups[0]) == 60 and len(groups[0] & groups[1]) < 10


@pytest.mark.parametrize("size", [40.0, 60.0, 120.0])
def test_a_padded_budget_leaves_less_than_a_twentieth_to_padding(size: float) -> None:
    lengths = lognormal(3200)
    steps = pack(lengths, CostBudget("seconds", size, 8), pool=None, key=(10,))
    assert padded_share(lengths, steps) < 0.03
    assert 1 - padded_share(lengths, steps) == pytest.approx(useful_share(lengths, steps))


@pytest.mark.parametrize("size", [200.0, 400.0])
def test_a_packed_budget_is_filled_but_for_the_last_step(size: float) -> None:
    lengths = lognormal(12_000)
    group = 4
    steps = pack(lengths, CostBudget("seconds", size, group, padded=False), pool=None, key=(11,))
    assert lengths.sum() / (len(steps) * group * size) >= 0.95


@pytest.mark.parametrize("ranks", WORLD_SIZES)
@pytest.mark.parametrize("padded", [True, False])
def test_ranks_run_like_lengths_at_once(ranks: int, padded: bool) -> None:
    lengths = lognormal(3200)
    steps = pack(lengths, CostBudget("seconds", 60, 24, padded), pool=None, key=(12,))
    unsorted = shuffled(lengths, micro_batches=24, step=24 * 16)
    assert straggler(lengths, steps, ranks) < 1.06
    assert straggler(lengths, steps, ranks) < straggler(lengths, unsorted, ranks) - 0.1


@pytest.mark.parametrize(("group", "most"), [(2, 1.03), (4, 1.05), (8, 1.1)])
def test_packed_micro_batches_of_a_mixed_step_hold_about_as_much(group: int, most: float) -> None:
    lengths = lognormal(3200)

    def longest_over_mean(padded: bool) -> float:
        steps = pack(lengths, SampleBudget(8 * group, group, padded), pool=1, key=(14,))
        held = np.array([[sum(lengths[place] for place in micro) for micro in step] for step in steps])
        return float(held.max(1).sum() / held.mean(1).sum())

    assert longest_over_mean(padded=False) < most
    assert longest_over_mean(padded=True) > 1.3


def test_the_longest_of_a_round_goes_to_whom_has_least() -> None:
    lengths = np.array([1.0, 1.0, 2.0, 4.0, 5.0])
    (step,) = pack(lengths, SampleBudget(5, 2, padded=False), pool=None, key=(15,))
    # 5 | 4, then 2 to the second and 1 to the first: 6 | 6, and the last one to the first.
    assert [sorted(lengths[micro].tolist()) for micro in step] == [[1.0, 1.0, 5.0], [2.0, 4.0]]


def test_the_straggler_is_the_slowest_rank_over_the_mean() -> None:
    lengths = np.array([1.0, 2.0, 4.0, 4.0, 3.0, 3.0])
    steps = [[np.array([0]), np.array([1]), np.array([2, 3]), np.array([4, 5])]]
    assert straggler(lengths, steps, ranks=2) == pytest.approx((2 + 8) / ((1 + 2) / 2 + (8 + 6) / 2))
