"""Exactly-once accounting: what is trained, summed over ranks, is what was planned, or the run ends."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from echox.errors import DataError
from echox.stream.accounting import Accounts, join64, micro_batch_account, split64, sum64
from echox.stream.collate import Item
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan, Window
from echox.stream.storage.store import Sample, ShardStore
from tests.stream.datasets import make_dataset, sized
from tests.stream.streaming import Batch, Collate, Run, Setting

PLAN = Plan([sized([9, 4], name="a"), sized([6], name="b")], seed=3, budget=SampleBudget(8, 4), window_shards=3)
NAMES = [source.name for source in PLAN.sources]


def vector(
    window: Window, places: np.ndarray, hashes: np.ndarray | None = None, dropped: Mapping[int, str] | None = None
) -> np.ndarray:
    hashes = window.hash_N[places] if hashes is None else hashes
    return micro_batch_account(window, places, hashes, dropped or {}, len(NAMES))


@pytest.mark.parametrize("budget", [SampleBudget(13, 4), CostBudget("tokens", 500.0, 4)], ids=str)
def test_numbers_of_each_source_are_those_counted_one_by_one(budget: Budget) -> None:
    window = Plan(PLAN.sources, seed=3, budget=budget, window_shards=3).window(0, 0)
    books = Accounts(NAMES)
    total = np.zeros(0)
    padded = dict.fromkeys(NAMES, 0.0)
    for places in window.steps[0]:
        account = vector(window, places)
        total = account if not len(total) else total + account
        for place in places:
            padded[NAMES[window.source_N[place]]] += window.length_N[places].max()
    books.expect(window, 0)
    metrics = books.check(total.tolist())
    trained = window.samples(0)
    assert metrics["data/samples"] == len(trained) and metrics["data/quarantined"] == 0
    for index, name in enumerate(NAMES):
        mine = [place for place in trained if window.source_N[place] == index]
        assert metrics[f"data/{name}/samples"] == len(mine)
        assert metrics[f"data/{name}/seconds"] == pytest.approx(sum(window.seconds_N[place] for place in mine))
        assert metrics[f"data/{name}/tokens"] == pytest.approx(sum(window.tokens_N[place] for place in mine))
        if mine:
            useful = sum(window.length_N[place] for place in mine)
            assert metrics[f"data/{name}/padding_share"] == pytest.approx(1 - useful / padded[name])


@pytest.mark.parametrize("fault", ["lost", "twice", "swapped", "foreign", "of another epoch"])
def test_a_sample_that_is_not_the_planned_one_ends_the_run(fault: str) -> None:
    window, books = PLAN.window(0, 0), Accounts(NAMES)
    places = window.samples(0)
    outside = np.setdiff1d(np.arange(len(window.hash_N)), places)
    other = PLAN.window(1, 0)
    trained = {
        "lost": places[:-1],
        "twice": np.append(places, places[0]),
        "swapped": np.append(places[:-1], outside[0]),
        "foreign": places,
        "of another epoch": places,
    }[fault]
    hashes = window.hash_N[trained].copy()
    if fault == "foreign":
        hashes[2] += np.uint64(1)
    if fault == "of another epoch":
        hashes[2] = other.hash_N[2]
    books.expect(window, 0)
    with pytest.raises(DataError, match="are not those of the plan"):
        books.check(vector(window, trained, hashes).tolist())
    assert books.seen == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sets") / "set", 40, per_shard=7)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("fault", ["lost", "twice", "of the step before", "of the next rank"])
def test_a_micro_batch_out_of_place_on_any_rank_ends_the_run_on_all(
    folder: Path, tmp_path: Path, fault: str, rank: int
) -> None:
    with Run([folder], tmp_path, Setting(world_size=4)) as run:
        before = [batch for batches in run.batches() for batch in batches]
        run.check_accounts(before)
        batches = [batch for batches in run.batches() for batch in batches]
        trained = {
            "lost": [batch for batch in batches if batch is not batches[rank]],
            "twice": [*batches, batches[rank]],
            "of the step before": [*batches[:rank], before[rank], *batches[rank + 1 :]],
            "of the next rank": [*batches[:rank], batches[(rank + 1) % 4], *batches[rank + 1 :]],
        }[fault]
        account = np.sum([batch.account for batch in trained], axis=0).tolist()
        for reader in run.ranks:
            reader.commit()
            with pytest.raises(DataError, match="are not those of the plan"):
                reader.check_accounts(account)


def test_a_store_that_gives_another_sample_than_was_asked_for_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardStore.read

    def confused(store: ShardStore, sample: int, members: Collection[str] | None = None) -> Sample:
        return real(store, 0 if sample == 1 else sample, members)

    monkeypatch.setattr(ShardStore, "read", confused)
    with Run([folder], tmp_path, Setting(world_size=2)) as run, pytest.raises(DataError, match="or others in their"):
        for _ in range(4):
            run.train()


def test_many_steps_are_checked_at_once(folder: Path, tmp_path: Path) -> None:
    with Run([folder], tmp_path) as often, Run([folder], tmp_path) as seldom:
        total, accounts = 0, []
        for _ in range(5):
            metrics = often.check_accounts(batch for batches in often.batches() for batch in batches)
            for reader in seldom.ranks:
                batches = reader.step(seldom.done)
                accounts += [batch.account for batch in batches]
                total += sum(len(batch.ids) for batch in batches)
                reader.commit()
            seldom.done += 1
        (late,) = (reader.check_accounts(np.sum(accounts, axis=0).tolist()) for reader in seldom.ranks)
        assert late["data/samples"] == total == metrics[0]["data/samples"]
        assert late["data/epoch"] == total / 40
        assert seldom.ranks[0].record()["multiset"] == often.ranks[0].record()["multiset"]


def test_a_dropped_sample_is_accounted_for_and_no_longer_trained() -> None:
    window, books = PLAN.window(0, 0), Accounts(NAMES)
    places = window.samples(0)
    books.expect(window, 0)
    metrics = books.check(vector(window, places[1:], dropped={places[0]: "checksum"}).tolist())
    assert (metrics["data/samples"], metrics["data/quarantined"], metrics["data/quarantined/checksum"]) == (
        len(places),
        1,
        1,
    )
    assert books.quarantined_multiset == int(window.hash_N[places[0]])
    assert books.multiset == sum(window.hash_N[places].tolist()) % 2**64
    unknown = Accounts(NAMES)
    unknown.expect(window, 0)
    assert unknown.check(vector(window, places[1:], dropped={places[0]: "smudge"}).tolist())["data/quarantined/other"]


class CutRow(NamedTuple):
    id: str
    cut_s: float
    turns_dropped: int


class Cutting(Collate):
    """Samples that lack as many seconds of audio as their number, and twice as many turns."""

    def decode(self, item: Item) -> Any:
        return CutRow(super().decode(item), float(item.sample.number), 2 * item.sample.number)

    def join(self, rows: Sequence[Any], step: int) -> Batch:
        return super().join([row.id for row in rows], step)


def test_cut_samples_and_what_they_lack_are_added_up_over_ranks_steps_and_resumes(folder: Path, tmp_path: Path) -> None:
    collate = Cutting()
    with Run([folder], tmp_path, Setting(world_size=2), collate=collate) as run:
        trained = [name for _ in range(2) for micro in run.train() for name in micro]
        saved = json.loads(json.dumps(run.ranks[0].record()))
    with Run([folder], tmp_path, Setting(world_size=4), saved, 2, collate=collate) as run:
        batches = [batch for rank in run.batches() for batch in rank]
        metrics = run.check_accounts(batches)[-1]
    trained += [name for batch in batches for name in batch.ids]
    lacking = [int(name.rpartition("-")[2]) for name in trained]
    assert metrics["data/cut_s"] == metrics["data/set-sqa/cut_s"] == sum(lacking) > 0
    assert metrics["data/cut"] == metrics["data/set-sqa/cut"] == np.count_nonzero(lacking)
    assert metrics["data/turns_dropped"] == 2 * sum(lacking)


def test_nothing_cut_is_shown_as_such_and_a_record_without_the_numbers_begins_at_none() -> None:
    window, books = PLAN.window(0, 0), Accounts(NAMES)
    books.expect(window, 0)
    metrics = books.check(vector(window, window.samples(0)).tolist())
    assert (metrics["data/cut"], metrics["data/cut_s"]) == (0, 0) and "data/a-sqa/cut" not in metrics
    assert "data/turns_dropped" not in metrics
    record = books.to_json()
    for row in record["sources"]:
        del row["cut"], row["cut_s"], row["turns_dropped"]
    again = Accounts(NAMES)
    again.load(record)
    assert again.table.tolist() == books.table.tolist()


def test_the_books_go_on_from_their_json() -> None:
    window, books, again = PLAN.window(0, 0), Accounts(NAMES), Accounts(NAMES)
    books.expect(window, 0)
    places = window.samples(0)
    books.check(vector(window, places[2:], dropped=dict.fromkeys(places[:2], "decode")).tolist())
    again.load(json.loads(json.dumps(books.to_json())))
    assert again.to_json() == books.to_json() and again.seen == len(window.samples(0))


def test_sums_over_thousands_of_ranks_are_exact_in_floating_point() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, dtype=np.uint64)
    total = np.zeros(3)
    for value in hashes.tolist():
        total += split64(value)
    assert join64(total) == sum(hashes.tolist()) % 2**64 == sum64(hashes)
    most = 2**31 - 1
    assert join64(np.array(split64(2**64 - 1), dtype=np.float64) * most) == (2**64 - 1) * most % 2**64
