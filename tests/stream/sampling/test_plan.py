"""The plan over random datasets and parameters: what an epoch, a step and a rank get, and that nothing else decides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from echox.errors import DataError, RecipeError
from echox.stream.format.indexing import index_folder
from echox.stream.sampling import keyed_rng
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan, StepAddress, Window
from echox.stream.sampling.source import Source
from tests.stream.datasets import make_dataset, sized, source
from tests.stream.tars import files, write_tar

if TYPE_CHECKING:
    from numpy.typing import NDArray

Visit = tuple[int, int]
"""Source and number of a sample."""


def random_sources(rng: np.random.Generator) -> list[Source]:
    """One to three datasets; shards of any size, empty and single ones among them."""
    return [
        sized(
            [*rng.integers(0, 12, rng.integers(0, 8)).tolist(), 1], name=f"set{index}", repeat=int(rng.integers(1, 4))
        )
        for index in range(rng.integers(1, 4))
    ]


def random_budget(rng: np.random.Generator) -> Budget:
    group = int(rng.choice([1, 2, 4, 6, 12]))
    if rng.integers(2):
        return SampleBudget(int(rng.integers(1, 30)), group, padded=bool(rng.integers(2)))
    by = "tokens" if rng.integers(2) else "seconds"
    return CostBudget(by, float(rng.choice([3, 30, 300])), group, padded=bool(rng.integers(2)))


def random_plans(cases: int) -> Iterator[Plan]:
    for case in range(cases):
        rng = np.random.default_rng(case)
        yield Plan(
            random_sources(rng),
            seed=case,
            budget=random_budget(rng),
            window_shards=int(rng.integers(1, 7)),
            pool=int(rng.integers(1, 4)) if rng.integers(2) else None,
        )


def blended() -> Plan:
    sources = [sized([9, 4, 12], name="a", weight=2.0), sized([30], name="b", weight=1.0)]
    return Plan(sources, seed=5, budget=SampleBudget(8, 4), window_shards=2)


def epoch_of(plan: Plan, epoch: int = 0) -> Iterator[tuple[StepAddress, Window]]:
    """All steps of an epoch, by asking for the one after."""
    place = StepAddress(epoch, 0, 0)
    window = plan.window(epoch, 0)
    while place.epoch == epoch:
        yield place, window
        after = plan.following(place, len(window.steps))
        if after.window != place.window and after.epoch == epoch:
            window = plan.window(epoch, after.window)
        place = after


def visits(window: Window, places: object) -> list[Visit]:
    chosen = np.asarray(places, dtype=np.int64)
    return list(zip(window.source_N[chosen].tolist(), window.number_N[chosen].tolist(), strict=True))


def columns(window: Window) -> list[list[float]]:
    names = ("source_N", "number_N", "turn_N", "epoch_N", "length_N", "seconds_N", "tokens_N", "hash_N")
    return [getattr(window, name).tolist() for name in names]


def same(left: Window, right: Window) -> bool:
    steps = [[[micro.tolist() for micro in step] for step in window.steps] for window in (left, right)]
    return left.address == right.address and columns(left) == columns(right) and steps[0] == steps[1]


def test_an_epoch_of_a_union_holds_every_sample_exactly_as_often_as_it_is_repeated() -> None:
    for plan in random_plans(150):
        epoch = plan.seed % 3
        found = Counter(
            visit for place, window in epoch_of(plan, epoch) for visit in visits(window, window.samples(place.step))
        )
        wanted = Counter(
            {
                (index, number): read.repeat
                for index, read in enumerate(plan.sources)
                for number in range(read.catalogue.samples)
            }
        )
        assert found == wanted
        assert plan.samples_per_epoch == wanted.total()


def test_the_visits_of_two_epochs_all_have_different_hashes() -> None:
    for plan in random_plans(60):
        hashes = [
            value
            for epoch in (0, 1)
            for place, window in epoch_of(plan, epoch)
            for value in window.hash_N[window.samples(place.step)].tolist()
        ]
        assert len(set(hashes)) == len(hashes) == 2 * plan.samples_per_epoch


def test_ranks_of_every_world_size_share_each_step_evenly_without_loss_or_repetition() -> None:
    for plan in random_plans(100):
        group = plan.budget.micro_batches
        for place, window in epoch_of(plan):
            assert len(window.steps[place.step]) == group
            for world_size in (size for size in range(1, group + 1) if group % size == 0):
                ranks = [window.slots(place.step, rank, world_size) for rank in range(world_size)]
                assert {len(slots) for slots in ranks} == {group // world_size}
                shared = Counter(sample for slots in ranks for micro in slots for sample in micro.tolist())
                assert shared == Counter(window.samples(place.step).tolist())


def test_a_world_size_that_does_not_divide_the_micro_batches_is_refused() -> None:
    plan = Plan([sized([20])], seed=0, budget=SampleBudget(12, 6))
    with pytest.raises(RecipeError, match="6 micro-batches, which 4 processes cannot share"):
        plan.window(0, 0).slots(0, 0, 4)


def test_the_samples_of_a_step_do_not_depend_on_its_split_into_micro_batches() -> None:
    for case in range(60):
        rng = np.random.default_rng(case)
        sources, step, pool = random_sources(rng), int(rng.integers(1, 20)), int(rng.integers(1, 4))
        streams = []
        for group in (1, 3, 8):
            plan = Plan(sources, seed=case, budget=SampleBudget(step, group), window_shards=3, pool=pool)
            streams.append([visits(window, window.samples(place.step)) for place, window in epoch_of(plan)])
        assert streams[0] == streams[1] == streams[2]


def test_steps_of_a_window_differ_by_one_sample() -> None:
    for plan in random_plans(150):
        if isinstance(plan.budget, SampleBudget):
            windows = plan.order.windows(0)
            assert windows is not None
            for window in range(windows):
                sizes = [sum(map(len, step)) for step in plan.window(0, window).steps]
                assert max(sizes) - min(sizes) <= 1 and max(sizes) <= plan.budget.step


def test_a_window_is_whole_shards_and_no_more_than_allowed() -> None:
    for plan in random_plans(100):
        seen: Counter[tuple[int, int, int]] = Counter()
        for number in range(plan.order.windows(0) or 0):
            window = plan.window(0, number)
            shards = Counter[tuple[int, int, int]]()
            for index, sample, turn in zip(
                window.source_N.tolist(), window.number_N.tolist(), window.turn_N.tolist(), strict=True
            ):
                starts = plan.sources[index].catalogue.shard_starts
                shards[index, int(np.searchsorted(starts, sample, side="right")) - 1, turn] += 1
            assert 1 <= len(shards) <= plan.window_shards
            for (index, shard, _), count in shards.items():
                assert count == np.diff(plan.sources[index].catalogue.shard_starts)[shard]
            seen += Counter(dict.fromkeys(shards, 1))
        assert set(seen.values()) == {1}


@pytest.mark.parametrize("blend", [False, True])
def test_a_window_is_the_same_planned_in_order_backwards_or_alone(blend: bool) -> None:
    def fresh() -> Plan:
        if blend:
            return blended()
        sources = [sized([3, 1, 8, 0, 5], name="a", repeat=2), sized([4, 4, 4], name="b")]
        return Plan(sources, seed=2, budget=CostBudget("tokens", 200.0, 4), window_shards=3)

    one, other = fresh(), fresh()
    places = [(epoch, window) for epoch in (0, 1) for window in range(4)]
    in_order = {place: one.window(*place) for place in places}
    for place in reversed(places):
        assert same(other.window(*place), in_order[place])
        assert same(fresh().window(*place), in_order[place])


@pytest.mark.parametrize("blend", [False, True])
def test_a_window_far_away_takes_no_more_randomness_than_the_first(
    blend: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    plain = keyed_rng.raw

    def counted(count: int, *path: int | str) -> NDArray[np.uint64]:
        drawn.append(count)
        return plain(count, *path)

    monkeypatch.setattr(keyed_rng, "raw", counted)

    def cost(epoch: int, window: int) -> int:
        drawn.clear()
        plan = blended() if blend else Plan([sized([5] * 200)], seed=2, budget=SampleBudget(8, 4), window_shards=2)
        plan.window(epoch, window)
        return sum(drawn)

    far = cost(0, 1_000_000) if blend else cost(9, 99)
    assert 0 < far <= 2 * cost(0, 0)


def test_the_step_after_the_last_is_in_the_next_window_and_after_that_in_the_next_epoch() -> None:
    plan = Plan([sized([8, 8, 8])], seed=0, budget=SampleBudget(4, 2), window_shards=1)
    assert plan.following(StepAddress(0, 1, 0), steps=2) == StepAddress(0, 1, 1)
    assert plan.following(StepAddress(0, 1, 1), steps=2) == StepAddress(0, 2, 0)
    assert plan.following(StepAddress(0, 2, 1), steps=2) == StepAddress(1, 0, 0)
    assert blended().following(StepAddress(0, 10**6, 1), steps=2) == StepAddress(0, 10**6 + 1, 0)


def test_another_seed_or_epoch_gives_another_order_of_shards_and_of_samples() -> None:
    def plan(seed: int) -> Plan:
        return Plan([sized([6] * 6)], seed=seed, budget=SampleBudget(6, 3), window_shards=2)

    def shards(seed: int, epoch: int) -> tuple[int, ...]:
        windows = [plan(seed).window(epoch, number) for number in range(3)]
        return tuple(first // 6 for window in windows for first in window.number_N[::6].tolist())

    orders = {shards(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4 and all(sorted(found) == [0, 1, 2, 3, 4, 5] for found in orders)

    one_shard = [Plan([sized([36])], seed=seed, budget=SampleBudget(6, 3)) for seed in (1, 2)]
    steps = {str([np.concatenate(step) for step in p.window(epoch, 0).steps]) for p in one_shard for epoch in (0, 1)}
    assert len(steps) == 4


def test_windows_of_one_epoch_have_different_orders_within() -> None:
    plan = Plan([sized([12, 12])], seed=0, budget=SampleBudget(3, 3), window_shards=1, pool=1)
    first, second = ([sorted(np.concatenate(step).tolist()) for step in plan.window(0, n).steps] for n in (0, 1))
    assert first != second


def test_lengths_are_those_of_the_catalogue() -> None:
    sources = [sized([7, 3], name="heard"), sized([4], name="said", task="tts")]
    for by in ("seconds", "tokens"):
        window = Plan(sources, seed=0, budget=CostBudget(by, 50.0, 2)).window(0, 0)
        for place, (index, number) in enumerate(visits(window, range(14))):
            record = sources[index].catalogue.records[number]
            heard = max(float(record["question_s"]), 0.1)
            if index == 0:
                seconds, tokens = heard, 25 * heard + int(record["answer_chars"]) / 4
            else:
                seconds, tokens = float(record["answer_s"]), int(record["units"]) + int(record["answer_chars"]) / 4
            assert window.seconds_N[place] == pytest.approx(seconds)
            assert window.tokens_N[place] == pytest.approx(tokens)
        assert window.length_N.tolist() == (window.seconds_N if by == "seconds" else window.tokens_N).tolist()


def test_no_step_of_a_blend_is_short() -> None:
    plan = blended()
    for number in range(20):
        assert {sum(map(len, step)) for step in plan.window(0, number).steps} == {8}


def test_a_window_of_a_blend_has_as_many_samples_as_its_shards_on_average() -> None:
    sources = [sized([9, 4, 12], name="a", weight=2.0), sized([30], name="b", weight=1.0)]
    sizes = {
        budget: len(Plan(sources, seed=0, budget=budget, window_shards=2).window(0, 0).number_N)
        for budget in (SampleBudget(8, 4), SampleBudget(100, 4), CostBudget("seconds", 9.0, 4))
    }
    assert list(sizes.values()) == [32, 100, 27]


GOLDEN = {
    "samples": "f104343cf618570b0ba8c4b834aeecb1746c5235d73a5b15d1b332af45ec6ac0",
    "padded": "a8d991ab0638c51871ff14f050fa269888439069de8a41a6467c48effcc59749",
    "packed": "92dbbe1629e359a9af2fdd1b0f707537a7193a428c29d177187e8b702674559f",
    "blend": "24ebbe1f942434de52b71c51d13355725f18a41a728f20249359efd8f0fa18c0",
}
"""SHA-256 of three epochs' rows. Where one changes, checkpoints cannot be continued: raise `plan.FORMAT` with it."""


def plain_lengths(shards: list[int], name: str, weight: float | None = None) -> Source:
    """A source whose lengths no random generator decides."""
    made = sized(shards, name=name, repeat=2 if name == "b" and weight is None else 1, weight=weight)
    numbers = np.arange(made.catalogue.samples)
    made.catalogue.records["question_s"] = 0.5 + numbers * 7919 % 101 / 8
    made.catalogue.records["answer_chars"] = numbers * 104_729 % 97
    return made


def golden_plan(kind: str) -> Plan:
    budgets: dict[str, Budget] = {
        "samples": SampleBudget(12, 4),
        "padded": CostBudget("seconds", 40.0, 4),
        "packed": CostBudget("tokens", 900.0, 4, padded=False),
        "blend": SampleBudget(12, 4),
    }
    weights = (2.0, 1.0) if kind == "blend" else (None, None)
    sources = [plain_lengths([9, 0, 14, 1, 20], "a", weights[0]), plain_lengths([25, 6], "b", weights[1])]
    pool = 2 if kind == "samples" else None
    return Plan(sources, seed=11, budget=budgets[kind], window_shards=2, pool=pool, weight_by="seconds")


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_stream_of_a_format_never_changes(kind: str) -> None:
    plan = golden_plan(kind)
    rows = []
    for epoch in range(3):
        for number in range(4):
            window = plan.window(epoch, number)
            for step, micro_batches in enumerate(window.steps):
                for slot, places in enumerate(micro_batches):
                    for place in places:
                        visit = (window.source_N, window.number_N, window.epoch_N, window.turn_N)
                        rows.append([int(column[place]) for column in visit] + [step, slot])
    assert len(rows) > 200
    assert hashlib.sha256(np.array(rows, dtype="<i8").tobytes()).hexdigest() == GOLDEN[kind]


def test_a_real_dataset_with_shards_of_one_sample_and_more_ranks_than_shards(tmp_path: Path) -> None:
    single = source(make_dataset(tmp_path / "single", 5, per_shard=1))
    few = source(make_dataset(tmp_path / "few", 9, per_shard=8, seed=1))
    assert len(few.catalogue.shard_names) == 2
    plan = Plan([single, few], seed=0, budget=SampleBudget(16, 8), window_shards=3)
    trained: Counter[Visit] = Counter()
    for place, window in epoch_of(plan):
        for rank in range(8):
            (micro,) = window.slots(place.step, rank, 8)
            trained += Counter(visits(window, micro))
    assert trained == Counter([(0, number) for number in range(5)] + [(1, number) for number in range(9)])


def with_empty_shards(folder: Path, sizes: list[int]) -> Source:
    folder.mkdir()
    for shard, size in enumerate(sizes):
        write_tar(folder / f"shard-{shard}.tar", files(size, first=100 * shard))
    index_folder(folder)
    return source(folder)


def test_empty_shards_take_no_part(tmp_path: Path) -> None:
    read = with_empty_shards(tmp_path / "d", [0, 3, 0, 0, 2, 0])
    assert len(read.catalogue.shard_names) == 6
    plan = Plan([read], seed=0, budget=SampleBudget(2, 2), window_shards=1)
    assert plan.order.windows(0) == 2
    found = [visit for place, window in epoch_of(plan) for visit in visits(window, window.samples(place.step))]
    assert sorted(found) == [(0, number) for number in range(5)]


def test_no_sample_at_all_is_refused_by_name(tmp_path: Path) -> None:
    nothing = with_empty_shards(tmp_path / "hollow", [0, 0])
    with pytest.raises(DataError, match="there is no sample in hollow") as caught:
        Plan([nothing], seed=0, budget=SampleBudget(2, 2))
    assert caught.value.where == str(tmp_path / "hollow")


def test_a_source_without_samples_beside_another_is_left_out_of_a_union() -> None:
    plan = Plan([sized([0, 0], name="hollow"), sized([3], name="full")], seed=0, budget=SampleBudget(2, 2))
    found = [visit for place, window in epoch_of(plan) for visit in visits(window, window.samples(place.step))]
    assert sorted(found) == [(1, 0), (1, 1), (1, 2)]
    assert plan.order.cursors(1, 0) == [{"epoch": 1, "samples": 0}] * 2


@pytest.mark.parametrize("samples", [1, 3, 7])
@pytest.mark.parametrize("budget", [SampleBudget(64, 8), CostBudget("seconds", 1000.0, 8)])
def test_fewer_samples_than_a_step_or_its_micro_batches_are_one_step_with_a_slot_for_every_rank(
    samples: int, budget: Budget
) -> None:
    plan = Plan([sized([samples])], seed=0, budget=budget)
    ((place, window),) = epoch_of(plan)
    assert plan.following(place, 1) == StepAddress(1, 0, 0)
    slots = [window.slots(0, rank, 8) for rank in range(8)]
    assert [len(mine) for mine in slots] == [1] * 8
    assert sorted(len(micro) for mine in slots for micro in mine) == [0] * (8 - samples) + [1] * samples


def test_the_cursors_of_a_union_count_what_the_windows_before_held() -> None:
    for plan in random_plans(60):
        taken = np.zeros(len(plan.sources), dtype=np.int64)
        for number in range(plan.order.windows(1) or 0):
            wanted = [{"epoch": 1, "samples": count} for count in taken.tolist()]
            assert plan.order.cursors(1, number) == wanted
            taken += np.bincount(plan.window(1, number).source_N, minlength=len(plan.sources))


def test_the_digest_tells_parameters_apart_that_make_other_streams() -> None:
    def digest(budget: Budget, **parameters: int) -> str:
        return Plan([sized([5])], seed=0, budget=budget, **parameters).digest()  # type: ignore[arg-type]

    usual = digest(SampleBudget(8, 2))
    others = [
        digest(SampleBudget(9, 2)),
        digest(SampleBudget(8, 2), window_shards=3),
        digest(SampleBudget(8, 2), pool=3),
        digest(CostBudget("seconds", 8.0, 2)),
        digest(CostBudget("seconds", 8.0, 4)),
        digest(CostBudget("tokens", 8.0, 2)),
        digest(CostBudget("seconds", 8.0, 2, padded=False)),
        blended().digest(),
    ]
    assert len({usual, *others}) == 9
    assert digest(SampleBudget(8, 4)) == usual
