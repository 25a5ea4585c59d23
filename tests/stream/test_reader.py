"""What comes is the plan's business alone: not that of threads, ranks, portions, or of which read ends first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from echox.errors import RecipeError
from echox.stream.collate import Item
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan
from echox.stream.storage.store import Sample, ShardStore
from tests.stream.datasets import make_dataset, source
from tests.stream.streaming import Collate, Run, Setting, plan_of

STEPS = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Shards of five and of one sample; the second dataset comes twice an epoch."""
    folder = tmp_path_factory.mktemp("sets")
    return [
        make_dataset(folder / "a", 23, per_shard=5, seed=1),
        make_dataset(folder / "b", 7, per_shard=1, seed=2),
    ]


def planned(folders: list[Path], steps: int) -> list[list[list[str]]]:
    """Step, micro-batch, ids: what the plan says, looked up one by one."""
    plan = plan_of(folders)
    found: list[list[list[str]]] = []
    epoch = number = 0
    while len(found) < steps:
        window = plan.window(epoch, number)
        for step in window.steps:
            found.append(
                [
                    [plan.sources[window.source_N[p]].catalogue.key(int(window.number_N[p])) for p in places]
                    for places in step
                ]
            )
        number += 1
        if number == plan.order.windows(epoch):
            epoch, number = epoch + 1, 0
    return found[:steps]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("prefetch", range(1, 8))
def test_the_stream_is_the_plan_however_many_threads_read_however_far_ahead(
    folders: list[Path], tmp_path: Path, threads: int, prefetch: int
) -> None:
    with Run(folders, tmp_path, Setting(threads=threads, prefetch=prefetch)) as run:
        assert [run.train() for _ in range(STEPS)] == planned(folders, STEPS)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_slots_of_all_ranks_together_are_the_step(
    folders: list[Path], tmp_path: Path, world_size: int, threads: int
) -> None:
    with Run(folders, tmp_path, Setting(world_size, threads=threads)) as run:
        assert [run.train() for _ in range(STEPS)] == planned(folders, STEPS)


@pytest.mark.parametrize(("world_size", "micro_batches"), [(3, 3), (6, 12), (12, 12)])
def test_other_portions_have_the_same_samples_in_each_step(
    folders: list[Path], tmp_path: Path, world_size: int, micro_batches: int
) -> None:
    with Run(folders, tmp_path, Setting(world_size, micro_batches)) as run:
        found = [sorted(name for micro in run.train() for name in micro) for _ in range(STEPS)]
    assert found == [sorted(name for micro in step for name in micro) for step in planned(folders, STEPS)]


def test_an_epoch_is_every_sample_as_often_as_it_is_repeated(folders: list[Path], tmp_path: Path) -> None:
    once, twice = (source(folder).catalogue for folder in folders)
    expected = Counter({once.key(n): 1 for n in range(once.samples)} | {twice.key(n): 2 for n in range(twice.samples)})
    with Run(folders, tmp_path, Setting(world_size=2)) as run:
        for _ in range(2):
            seen: Counter[str] = Counter()
            while seen.total() < expected.total():
                seen.update(name for micro in run.train() for name in micro)
            assert seen == expected
        assert run.ranks[0].accounts.seen == 2 * expected.total()


class Backwards(ShardStore):
    """A store whose very first read ends when all others of its step have."""

    def __init__(self, folder: Path, others: int) -> None:
        super().__init__(source(folder).catalogue)
        self.others = threading.Semaphore(0)
        self.waits_for = others
        self.ended: list[str] = []
        self.lock = threading.Lock()
        self.held = False

    def read(self, sample: int, members: Collection[str] | None = None) -> Sample:
        with self.lock:
            first, self.held = not self.held, True
        if first:
            for _ in range(self.waits_for):
                assert self.others.acquire(timeout=60)
        read = super().read(sample, members)
        self.ended.append(read.key)
        self.others.release()
        return read


def test_batches_come_in_order_though_reads_end_in_another(folders: list[Path], tmp_path: Path) -> None:
    plan = plan_of(folders[:1])
    window = plan.window(0, 0)
    (step, *_), catalogue = window.steps, plan.sources[0].catalogue
    expected = [[catalogue.key(int(number)) for number in window.number_N[places]] for places in step]
    store = Backwards(folders[0], others=sum(map(len, expected[1:])))
    reader = StreamReader(
        plan, [store], Collate(), rank=0, world_size=1, threads=2, prefetch=1, allowance=Allowance(None, 1.0)
    )
    reader.start(step=0, run_folder=tmp_path, saved=None)
    assert [batch.ids for batch in reader.step(0)] == expected
    reader.close()
    late = expected[0][0]
    assert all(store.ended.index(name) < store.ended.index(late) for micro in expected[1:] for name in micro)


def test_only_a_commit_moves_the_cursor(folders: list[Path], tmp_path: Path) -> None:
    with Run(folders, tmp_path) as run:
        (reader,) = run.ranks
        before = reader.record()
        (batches,) = run.batches()
        assert reader.record() == before
        run.check_accounts(batches)
        after = reader.record()
    assert (before["window"], before["step"]) == (0, 0) != (after["window"], after["step"])
    assert after["samples"] == sum(len(batch.ids) for batch in batches)


def test_a_step_out_of_turn_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with Run(folders, tmp_path) as run:
        run.train()
        for wrong in (0, 2):
            with pytest.raises(ValueError, match=f"step {wrong} was asked for when 1 was due"):
                run.ranks[0].step(wrong)


def test_a_world_that_does_not_divide_a_step_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="4 micro-batches, which 3 processes cannot share"):
        Run(folders, tmp_path, Setting(world_size=3)).__enter__()


def test_no_thread_outlives_the_reader(folders: list[Path], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Run(folders, tmp_path, Setting(world_size=2, threads=4)) as run:
        run.train()
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_closing_lets_go_of_the_shards_of_all_sources(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ShardStore] = []
    monkeypatch.setattr(ShardStore, "close", lambda store: closed.append(store))
    with Run(folders, tmp_path) as run:
        run.train()
        assert not closed
    assert [store.catalogue.location for store in closed] == [str(folder) for folder in folders]


def test_a_failing_rank_leaves_no_thread_either(folders: list[Path], tmp_path: Path) -> None:
    class Broken(Collate):
        def decode(self, item: Item) -> str:
            raise RuntimeError("out of order")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="out of order"), Run(folders, tmp_path, collate=Broken()) as run:
        run.train()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("stop", range(STEPS))
def test_what_was_read_ahead_when_a_run_stopped_comes_again(folders: list[Path], tmp_path: Path, stop: int) -> None:
    with Run(folders, tmp_path, Setting(prefetch=16)) as run:
        for _ in range(stop):
            run.train()
        run.batches()  # delivered, never trained
        saved = run.ranks[0].record()
    with Run(folders, tmp_path, Setting(world_size=2), saved, stop) as run:
        assert [run.train() for _ in range(STEPS - stop)] == planned(folders, STEPS)[stop:]


BUDGETS: list[Budget] = [
    SampleBudget(7, 4),
    CostBudget("seconds", 30.0, 4),
    CostBudget("tokens", 400.0, 4, padded=False),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_uneven_shards_give_every_rank_as_many_micro_batches_in_every_step(
    folders: list[Path], tmp_path: Path, budget: Budget
) -> None:
    """And the last samples of an epoch, too few for a step of their own, are all there."""
    plan = Plan([source(folder) for folder in folders], seed=2, budget=budget, window_shards=2)
    epoch = Counter(s.catalogue.key(number) for s in plan.sources for number in range(s.catalogue.samples))
    seen: Counter[str] = Counter()
    with Run(folders, tmp_path, Setting(world_size=4), plan=plan) as run:
        while seen.total() < epoch.total():
            ranks = run.batches()
            run.check_accounts(batch for rank in ranks for batch in rank)
            assert [len(rank) for rank in ranks] == [1, 1, 1, 1]
            seen.update(name for rank in ranks for batch in rank for name in batch.ids)
    assert seen == epoch


def test_fewer_samples_than_a_step_and_fewer_shards_than_ranks(tmp_path: Path) -> None:
    """Every rank has its micro-batches, some of them empty, and no sample is lost."""
    folder = make_dataset(tmp_path / "few", 3, per_shard=2)
    with Run([folder], tmp_path, Setting(world_size=4)) as run:
        for _ in range(3):
            step = run.train()
            assert len(step) == 4 and sorted(name for micro in step for name in micro) == [
                f"sqa0-{number:05d}" for number in range(3)
            ]
