"""The fixed pass over held-out data: every sample once, the same number of batches on every rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from echox.errors import CorruptSampleError
from echox.stream.packing import Budget, CostBudget, SampleBudget
from echox.stream.store import ShardStore
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


def test_a_damaged_sample_is_an_error(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", 4, per_shard=4)
    offset, _ = source(folder).catalogue.members(2)["question.flac"]
    flip(folder / "shard-000000.tar", offset)
    with pytest.raises(CorruptSampleError, match="has changed since it was indexed"):
        read(folder, BUDGETS[0])
