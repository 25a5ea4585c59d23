"""The fixed pass over held-out data: every sample once, the same number of batches on every rank."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from echox.errors import CorruptSampleError
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.storage.store import ShardStore
from echox.stream.validation import ValidReader
from tests.stream.datasets import make_dataset, source
from tests.stream.streaming import Collate
from tests.stream.tars import flip

BUDGETS: list[Budget] = [SampleBudget(8, 2), CostBudget("seconds", 12.0, 2), CostBudget("tokens", 60.0, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("valid") / "set", 23, per_shard=1)


def read(folder: Path, budget: Budget, rank: int = 0, world_size: int = 1, threads: int = 2) -> list[list[str]]:
    read_by_tokens = isinstance(budget, CostBudget) and budget.by == "tokens"
    held = source(folder)
    reader = ValidReader(
        held, ShardStore(held.catalogue), Collate(), budget,
        by_tokens=read_by_tokens, rank=rank, world_size=world_size, threads=threads, prefetch=2,
    )  # fmt: skip
    return [batch.ids for batch in reader]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_every_sample_comes_once_whatever_the_world(folder: Path, budget: Budget, world_size: int) -> None:
    ranks = [read(folder, budget, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(name for batches in ranks for batch in batches for name in batch)
    catalogue = source(folder).catalogue
    assert seen == Counter(catalogue.key(number) for number in range(catalogue.samples))
    together = [batch for turn in zip(*ranks, strict=True) for batch in turn if batch]
    assert together == read(folder, budget)


def test_the_order_does_not_depend_on_threads_and_a_pass_can_be_repeated(folder: Path) -> None:
    assert read(folder, BUDGETS[0], threads=1) == read(folder, BUDGETS[0], threads=5)


@pytest.mark.parametrize("by", ["seconds", "tokens"])
def test_samples_come_from_short_to_long_within_the_budget(folder: Path, by: str) -> None:
    held = source(folder)
    every = slice(0, held.catalogue.samples)
    lengths = held.seconds(every) if by == "seconds" else held.tokens(every)
    length = {held.catalogue.key(number): float(lengths[number]) for number in range(held.catalogue.samples)}
    size = 3 * float(lengths.mean())
    batches = read(folder, CostBudget(by, size, 2))
    stream = [length[name] for batch in batches for name in batch]
    assert stream == sorted(stream)
    assert all(len(batch) == 1 or len(batch) * max(map(length.__getitem__, batch)) <= size for batch in batches)


def test_a_pass_that_is_given_up_leaves_no_thread(folder: Path) -> None:
    before, held = set(threading.enumerate()), source(folder)
    store = ShardStore(held.catalogue)
    passing = iter(
        ValidReader(held, store, Collate(), BUDGETS[0], by_tokens=False, rank=0, world_size=1, threads=3, prefetch=2)
    )
    next(passing)
    assert set(threading.enumerate()) > before
    del passing
    assert set(threading.enumerate()) == before


def test_a_damaged_sample_is_an_error(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", 4, per_shard=4)
    offset, _ = source(folder).catalogue.members(2)["question.flac"]
    flip(folder / "shard-000000.tar", offset)
    with pytest.raises(CorruptSampleError, match="has changed since it was indexed"):
        read(folder, BUDGETS[0])
