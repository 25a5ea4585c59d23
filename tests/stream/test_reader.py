"""What comes is the plan's business alone: not that of threads, ranks, portions, or of which read ends first."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from echox.errors import RecipeError
from echox.stream.packing import SampleBudget
from echox.stream.plan import Plan
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.store import Sample, ShardStore
from tests.stream.datasets import make_dataset, source
from tests.stream.streaming import STEP, Collate, Run, Setting, plan_of

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


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(threads=1, prefetch=1),
        Setting(threads=8, prefetch=7),
        Setting(world_size=2),
        Setting(world_size=4, threads=1),
    ],
    ids=str,
)
def test_the_stream_is_the_plan_whatever_reads_it(folders: list[Path], tmp_path: Path, setting: Setting) -> None:
    with Run(folders, tmp_path, setting) as run:
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
        assert run.accounts.seen == 2 * expected.total()


class Backwards(ShardStore):
    """A store whose first read ends after the second one has."""

    def __init__(self, folder: Path) -> None:
        super().__init__(source(folder).catalogue)
        self.second = threading.Event()
        self.order: list[int] = []
        self.lock = threading.Lock()
        self.started = 0

    def read(self, sample: int, members: Collection[str] | None = None) -> Sample:
        with self.lock:
            self.started += 1
            mine = self.started
        if mine == 1:
            assert self.second.wait(60)
        read = super().read(sample, members)
        with self.lock:
            self.order.append(mine)
        if mine > 1:
            self.second.set()
        return read


def test_batches_come_in_order_though_reads_end_in_another(folders: list[Path], tmp_path: Path) -> None:
    store = Backwards(folders[0])
    plan = Plan([source(folders[0])], seed=7, budget=SampleBudget(STEP, 4), window_shards=3)
    reader = StreamReader(
        plan, [store], Collate(), rank=0, world_size=1, threads=2, prefetch=3, allowance=Allowance(None, 1.0)
    )
    reader.start(step=0, run_folder=tmp_path, saved=None)
    window = plan.window(0, 0)
    expected = [[plan.sources[0].catalogue.key(int(window.number_N[p])) for p in places] for places in window.steps[0]]
    assert [batch.ids for batch in reader.step(0)] == expected
    reader.close()
    assert store.order[0] != 1


def test_only_a_commit_moves_the_cursor(folders: list[Path], tmp_path: Path) -> None:
    with Run(folders, tmp_path) as run:
        (reader,) = run.ranks
        before = reader.record()
        (batches,) = run.batches()
        assert reader.record() == before
        run.settle(batches)
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


def test_fewer_samples_than_a_step_and_fewer_shards_than_ranks(tmp_path: Path) -> None:
    """Every rank has its micro-batches, some of them empty, and no sample is lost."""
    folder = make_dataset(tmp_path / "few", 3, per_shard=2)
    with Run([folder], tmp_path, Setting(world_size=4)) as run:
        for _ in range(3):
            step = run.train()
            assert len(step) == 4 and sorted(name for micro in step for name in micro) == [
                f"sqa0-{number:05d}" for number in range(3)
            ]
