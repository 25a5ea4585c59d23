"""A stream read as training reads it, without a model: batches that name their samples, ranks one after the other."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import SampleBudget
from echox.stream.sampling.plan import Plan
from echox.stream.storage.retry import Retry
from echox.stream.storage.store import ShardStore
from tests.stream.datasets import source

if TYPE_CHECKING:
    from echox.stream.collate import Item

STEP = 12
Moment = Literal["delivered", "committed", "half saved"]


@dataclass
class Batch:
    ids: list[str]
    step: int
    account: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Collate:
    """Members to nothing but the sample's id."""

    members = frozenset({"question.flac"})

    def decode(self, item: Item) -> str:
        assert item.sample["question.flac"]
        return item.sample.key

    def join(self, rows: Sequence[str], step: int) -> Batch:
        return Batch(list(rows), step)

    def blank(self, step: int) -> Batch:
        return Batch([], step)


@dataclass
class Setting:
    """What may differ between two attempts at one run."""

    world_size: int = 1
    micro_batches: int = 4
    threads: int = 2
    prefetch: int = 3


def plan_of(folders: Iterable[Path], micro_batches: int = 4) -> Plan:
    sources = [source(folder, repeat=1 + index) for index, folder in enumerate(folders)]
    return Plan(sources, seed=7, budget=SampleBudget(STEP, micro_batches), window_shards=3)


@dataclass
class Run:
    """An attempt: all ranks of one world, in one process."""

    folders: Sequence[Path]
    folder: Path
    setting: Setting = field(default_factory=Setting)
    saved: dict[str, Any] | None = None
    first: int = 0
    allowance: Allowance = field(default_factory=lambda: Allowance(None, 1.0))
    collate: Any = field(default_factory=Collate)
    plan: Plan | None = None

    def __enter__(self) -> Run:
        self.ranks = [self.reader(rank) for rank in range(self.setting.world_size)]
        for rank in self.ranks:
            rank.start(step=self.first, run_folder=self.folder, saved=self.saved)
        self.done = self.first
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.close()

    def reader(self, rank: int) -> StreamReader:
        plan = self.plan or plan_of(self.folders, self.setting.micro_batches)
        return StreamReader(
            plan,
            [ShardStore(source.catalogue, retry=Retry(attempts=3, first_wait_s=0.0)) for source in plan.sources],
            self.collate,
            rank=rank,
            world_size=self.setting.world_size,
            threads=self.setting.threads,
            prefetch=self.setting.prefetch,
            allowance=self.allowance,
        )

    def batches(self) -> list[list[Batch]]:
        """The next step: micro-batches of every rank."""
        return [rank.step(self.done) for rank in self.ranks]

    def check_accounts(self, batches: Iterable[Batch]) -> list[dict[str, float]]:
        """Commit the step, and check what all ranks trained."""
        account = np.sum([batch.account for batch in batches], axis=0)
        for rank in self.ranks:
            rank.commit()
        self.done += 1
        return [rank.check_accounts(account.tolist()) for rank in self.ranks]

    def train(self) -> list[list[str]]:
        """One step; ids of its micro-batches in the order of the plan."""
        ranks = self.batches()
        self.check_accounts(batch for rank in ranks for batch in rank)
        return [list(batch.ids) for turn in zip(*ranks, strict=True) for batch in turn]


def train_until(
    folders: Sequence[Path], run: Path, setting: Setting, steps: int, every: int, death: tuple[int, Moment] | None
) -> None:
    """Train to `steps` from the newest checkpoint, saving every so many; killed at a moment of a step.

    Each step appends its samples to `trained.jsonl`; what is done again after a crash is written again.
    """
    newest = max(run.glob("step-*.json"), default=None)
    saved = json.loads(newest.read_text()) if newest else None
    first = int(newest.stem.removeprefix("step-")) if newest else 0
    with Run(folders, run, setting, saved, first) as attempt, (run / "trained.jsonl").open("a") as trained:
        for step in range(first, steps):

            def die_here(moment: Moment, step: int = step) -> None:
                if death == (step, moment):
                    os.kill(os.getpid(), signal.SIGKILL)

            ranks = attempt.batches()
            die_here("delivered")
            attempt.check_accounts(batch for rank in ranks for batch in rank)
            trained.write(json.dumps({"step": step, "ids": in_plan_order(ranks)}) + "\n")
            trained.flush()
            die_here("committed")
            if (step + 1) % every and step + 1 < steps:
                continue
            path = run / f"step-{step + 1:06d}.json"
            path.with_suffix(".part").write_text(json.dumps(attempt.ranks[0].record()))
            die_here("half saved")
            path.with_suffix(".part").replace(path)


def in_plan_order(ranks: Sequence[Sequence[Batch]]) -> list[str]:
    """Samples of one step, as the ranks hold them, in the order in which the plan has them."""
    return [name for turn in zip(*ranks, strict=True) for batch in turn for name in batch.ids]
