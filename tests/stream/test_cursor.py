"""Where a stream stands and whether it may go on: resumed streams against ones that never stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from echox.errors import CheckpointError, DataError
from echox.stream import cursor
from echox.stream.accounting import Accounts, micro_batch_account
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan, StepAddress
from echox.stream.sampling.source import Source
from tests.stream.datasets import sized

Trained = list[tuple[str, int, int, int]]
"""Path, number, epoch and turn of every sample of a step, sorted."""

BUDGET = SampleBudget(8, 4)
COST = CostBudget("seconds", 20.0, 4)


def sources(weights: Sequence[float] | None = None) -> list[Source]:
    shards = ([9, 4, 7], [5, 5], [12, 0, 6])
    given: Sequence[float | None] = weights or (None, None, None)
    return [sized(sizes, name=name, weight=weight) for sizes, name, weight in zip(shards, "abc", given, strict=True)]


def plan_of(read: Sequence[Source] | None = None, *, budget: Budget = BUDGET, **parameters: Any) -> Plan:
    return Plan(read or sources(), **{"seed": 4, "budget": budget, "window_shards": 2, **parameters})


def books(plan: Plan) -> Accounts:
    return Accounts([source.name for source in plan.sources])


def train(plan: Plan, accounts: Accounts, place: StepAddress, steps: int) -> tuple[StepAddress, list[Trained]]:
    """Train some steps, one micro-batch after the other."""
    trained: list[Trained] = []
    for _ in range(steps):
        window = plan.window(place.epoch, place.window)
        places = window.samples(place.step)
        trained.append(
            sorted(
                (plan.sources[window.source_N[p]].path, *(int(column[p]) for column in columns))
                for columns in [(window.number_N, window.epoch_N, window.turn_N)]
                for p in places
            )
        )
        accounts.expect(window, place.step)
        account = micro_batch_account(window, places, window.hash_N[places], {}, len(plan.sources))
        accounts.check(account.tolist())
        place = plan.following(place, len(window.steps))
    return place, trained


def saved_after(plan: Plan, steps: int) -> dict[str, Any]:
    """A record as it comes back from a file."""
    accounts = books(plan)
    place, _ = train(plan, accounts, StepAddress(), steps)
    record: dict[str, Any] = json.loads(json.dumps(cursor.record(plan, place, accounts)))
    return record


def go_on(plan: Plan, saved: dict[str, Any], accept: bool = False) -> tuple[StepAddress, list[str]]:
    return cursor.resume(plan, saved, books(plan), accept_new_data=accept, where="runs/a")


@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("stop", [1, 4, 9, 23])
def test_a_resumed_stream_is_the_one_that_never_stopped(stop: int, weights: Sequence[float] | None) -> None:
    accounts = books(plan_of(sources(weights)))
    end, whole = train(plan_of(sources(weights)), accounts, StepAddress(), 30)
    saved = saved_after(plan_of(sources(weights)), stop)
    plan = plan_of(sources(weights))
    resumed = books(plan)
    place, new = cursor.resume(plan, saved, resumed, accept_new_data=False, where="")
    finished, rest = train(plan, resumed, place, 30 - stop)
    assert new == [] and rest == whole[stop:] and finished == end
    assert cursor.record(plan, finished, resumed) == cursor.record(plan, end, accounts)


def test_a_record_counts_what_was_trained() -> None:
    plan = plan_of()
    _, trained = train(plan, books(plan), StepAddress(), 11)
    saved = saved_after(plan, 11)
    visits = [visit for step in trained for visit in step]
    assert saved["samples"] == len(visits)
    for source, read in zip(saved["sources"], plan.sources, strict=True):
        numbers = np.array([number for path, number, *_ in visits if path == read.path], dtype=np.int64)
        assert source["consumed"]["samples"] == len(numbers)
        assert source["consumed"]["seconds"] == pytest.approx(read.seconds(numbers).sum())
    assert saved["tokens"] == pytest.approx(sum(source["consumed"]["tokens"] for source in saved["sources"]))


def test_the_window_starts_of_a_record_are_the_sums_over_the_windows_before() -> None:
    plan = plan_of()
    saved = saved_after(plan, 7)
    assert saved["window"] > 1
    before = [plan.window(saved["epoch"], window).source_N for window in range(saved["window"])]
    taken = np.bincount(np.concatenate(before), minlength=3).tolist()
    found = [source["window_starts"] for source in saved["sources"]]
    assert found == [{"epoch": saved["epoch"], "samples": count} for count in taken]


def words(value: Any) -> set[str]:
    """All keys of a record, at any depth."""
    if isinstance(value, dict):
        return set(value) | {word for part in value.values() for word in words(part)}
    return {word for part in value for word in words(part)} if isinstance(value, list) else set()


@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 1.0)])
def test_a_record_is_small_and_knows_nothing_of_ranks(weights: Sequence[float] | None) -> None:
    saved = saved_after(plan_of(sources(weights)), 40)
    assert len(json.dumps(saved, indent=1)) < 4096
    assert not [word for word in words(saved) for hint in ("rank", "worker", "world", "rng", "thread") if hint in word]


def test_a_record_does_not_depend_on_the_split_of_a_step() -> None:
    records = [saved_after(plan_of(budget=SampleBudget(8, split)), 13) for split in (1, 4, 8)]
    assert records[0] == records[1] == records[2]


@pytest.mark.parametrize("split", [1, 2, 8])
def test_another_split_of_the_same_step_continues_the_stream(split: int) -> None:
    _, whole = train(plan_of(), books(plan_of()), StepAddress(), 20)
    plan = plan_of(budget=SampleBudget(8, split))
    place, new = go_on(plan, saved_after(plan_of(), 9))
    assert new == []
    assert train(plan, books(plan), place, 11)[1] == whole[9:]


def test_another_world_size_continues_the_stream_with_the_same_samples() -> None:
    plan = plan_of(budget=COST)
    saved = saved_after(plan, 5)
    place, _ = go_on(plan_of(budget=COST), saved)
    window = plan.window(place.epoch, place.window)
    for world_size in (1, 2, 4):
        ranks = [window.slots(place.step, rank, world_size) for rank in range(world_size)]
        found = sorted(sample for slots in ranks for micro in slots for sample in micro.tolist())
        assert found == sorted(window.samples(place.step).tolist())


def altered(**changes: Any) -> list[Source]:
    """The sources, the second one changed."""
    first, second, third = sources()
    return [first, replace(second, **changes), third]


CHANGES: dict[str, tuple[Plan, Plan, str]] = {
    "seed": (plan_of(), plan_of(seed=5), "seed is 5 and was 4"),
    "step": (plan_of(), plan_of(budget=SampleBudget(9, 3)), "data.global_batch is 9 and was 8"),
    "window": (plan_of(), plan_of(window_shards=3), "data.window_shards is 3 and was 2"),
    "pool": (plan_of(), plan_of(pool=6), "data.pool is 6 and was None"),
    "size": (plan_of(budget=COST), plan_of(budget=replace(COST, size=30.0)), "data.budget.size is 30.0 and was 20.0"),
    "unit": (plan_of(budget=COST), plan_of(budget=replace(COST, by="tokens")), "data.budget.by is tokens"),
    "split": (
        plan_of(budget=COST),
        plan_of(budget=replace(COST, micro_batches=8)),
        "data.budget.micro_batches is 8 and was 4",
    ),
    "layout": (plan_of(budget=COST), plan_of(budget=replace(COST, padded=False)), "model.layout"),
    "task": (plan_of(), plan_of(altered(task="asr")), "the task of data.train.1 (b) is asr and was sqa"),
    "content": (
        plan_of(),
        plan_of(altered(catalogue=sized([5, 5], name="d").catalogue)),
        "the fingerprint of data.train.1 (b) is d00000000000 and was b00000000000",
    ),
    "fewer": (plan_of(), plan_of(sources()[:2]), "data.train has 2 sources and had 3"),
    "repeat": (plan_of(), plan_of(altered(repeat=2)), "repeat in data.train is [1, 2, 1] and was [1, 1, 1]"),
    "blend": (plan_of(), plan_of(sources((1.0, 1.0, 1.0))), "blending by weight in data.train is True and was None"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_stream_is_refused_by_the_recipes_name_of_the_change(what: str) -> None:
    before, after, clause = CHANGES[what]
    saved = saved_after(before, 6)
    assert go_on(before, saved)[1] == []
    accounts = books(after)
    with pytest.raises(CheckpointError) as caught:
        cursor.resume(after, saved, accounts, accept_new_data=False, where="runs/a")
    assert clause in str(caught.value) and caught.value.where == "runs/a"
    assert "--accept-new-data" in str(caught.value.fix)
    assert accounts.seen == 0


@pytest.mark.parametrize("what", CHANGES)
def test_an_accepted_change_begins_a_new_epoch_with_fresh_accounts(what: str) -> None:
    before, after, clause = CHANGES[what]
    accounts = books(after)
    saved = saved_after(before, 6)
    place, new = cursor.resume(after, saved, accounts, accept_new_data=True, where="")
    assert place == StepAddress(saved["epoch"] + 1, 0, 0)
    assert any(clause in line for line in new)
    assert accounts.seen == 0
    place, _ = train(after, accounts, place, 3)
    again = json.loads(json.dumps(cursor.record(after, place, accounts)))
    assert go_on(after, again) == (place, [])


def test_one_change_is_one_clause_and_two_are_two() -> None:
    saved = saved_after(plan_of(), 3)
    assert cursor.differences(plan_of(), saved) == []
    assert cursor.differences(plan_of(seed=1), saved) == ["seed is 1 and was 4"]
    assert len(cursor.differences(plan_of(seed=1, pool=2), saved)) == 2


def test_the_path_of_a_dataset_may_change() -> None:
    assert go_on(plan_of(altered(path="elsewhere/b")), saved_after(plan_of(), 3))[1] == []


@pytest.mark.parametrize("version", [0, 1, None])
def test_a_record_of_another_version_is_refused(version: int | None) -> None:
    saved = {**saved_after(plan_of(), 2), "version": version}
    with pytest.raises(CheckpointError, match=f"has version {version}, not 2"):
        go_on(plan_of(), saved, accept=True)


def test_damage_stays_in_the_accounts_of_a_resumed_run() -> None:
    plan, accounts = plan_of(), books(plan_of())
    window = plan.window(0, 0)
    places = window.samples(0)
    accounts.expect(window, 0)
    dropped = {int(places[0]): "decode", int(places[1]): "checksum"}
    accounts.check(micro_batch_account(window, places[2:], window.hash_N[places[2:]], dropped, 3).tolist())
    saved = json.loads(json.dumps(cursor.record(plan, plan.following(StepAddress(), len(window.steps)), accounts)))
    assert saved["quarantined"]["samples"] == 2 and saved["quarantined"]["kinds"] == {"decode": 1, "checksum": 1}
    resumed = books(plan)
    cursor.resume(plan, saved, resumed, accept_new_data=False, where="")
    assert resumed.to_json() == accounts.to_json() and resumed.seen == len(places)


def test_new_weights_hold_from_the_first_window_that_has_not_begun() -> None:
    def old() -> Plan:
        return plan_of(sources((1.0, 1.0, 1.0)))

    steps = len(old().window(0, 0).steps)
    assert steps > 1
    for stop, begins in [(2 * steps, 2), (2 * steps + 1, 3)]:
        plan = plan_of(sources((1.0, 2.0, 1.0)))
        place, new = go_on(plan, saved_after(old(), stop))
        assert (place.window, place.step) == (2, stop - 2 * steps)
        assert new == [
            f"weights by samples are [1.0, 2.0, 1.0] from window {begins} on and were [1.0, 1.0, 1.0]",
        ]
        for window in range(begins):
            assert plan.window(0, window).number_N.tolist() == old().window(0, window).number_N.tolist()
        shares = np.bincount(plan.window(0, begins).source_N, minlength=3) / len(plan.window(0, begins).source_N)
        assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.1)


def test_a_reweighted_stream_resumes_as_the_one_that_never_stopped() -> None:
    begun = saved_after(plan_of(sources((1.0, 1.0, 1.0))), 5)

    def reweighted() -> tuple[Plan, Accounts, StepAddress]:
        plan = plan_of(sources((1.0, 3.0, 1.0)), weight_by="seconds")
        accounts = books(plan)
        return plan, accounts, cursor.resume(plan, begun, accounts, accept_new_data=False, where="")[0]

    plan, accounts, place = reweighted()
    end, whole = train(plan, accounts, place, 20)
    stopped, kept, place = reweighted()
    place, _ = train(stopped, kept, place, 8)
    saved = json.loads(json.dumps(cursor.record(stopped, place, kept)))
    assert [(version["version"], version["by"]) for version in saved["blend"]] == [(1, "samples"), (2, "seconds")]

    last = plan_of(sources((1.0, 3.0, 1.0)), weight_by="seconds")
    resumed = books(last)
    place, new = cursor.resume(last, saved, resumed, accept_new_data=False, where="")
    finished, rest = train(last, resumed, place, 12)
    assert new == [] and rest == whole[8:]
    assert cursor.record(last, finished, resumed) == cursor.record(plan, end, accounts)


def test_the_same_weights_of_something_else_are_new_weights() -> None:
    equal = sources((1.0, 1.0, 1.0))
    plan = plan_of(equal, weight_by="tokens")
    _, (new,) = go_on(plan, saved_after(plan_of(equal), 5))
    assert new.startswith("weights by tokens are [1.0, 1.0, 1.0] from window")


def test_new_weights_may_not_starve_a_source() -> None:
    saved = saved_after(plan_of(sources((1.0, 1.0, 1.0))), 5)
    with pytest.raises(DataError, match="the weight of c is less than one sample"):
        go_on(plan_of(sources((1.0, 1.0, 0.001))), saved)
