"""Killed at random moments and resumed in other worlds, a run trains what an uninterrupted one does."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.stream import quarantine
from tests.stream.datasets import make_dataset, source
from tests.stream.streaming import Moment, Run, Setting, in_plan_order, train_until
from tests.stream.tars import flip

STEPS, TRIALS = 12, 20
DAMAGED = {0: (3, 16), 1: (2,)}
"""Numbers of the samples of each dataset that cannot be used."""
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.stream.streaming", "echox.stream.collate"])


@dataclass(frozen=True)
class Straight:
    """A run that nothing interrupts."""

    steps: list[list[str]]
    record: dict[str, Any]
    ledger: list[dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    made = [make_dataset(folder / "a", 17, per_shard=6, seed=3), make_dataset(folder / "b", 5, per_shard=2, seed=4)]
    for index, numbers in DAMAGED.items():
        catalogue = source(made[index]).catalogue
        for number in numbers:
            offset, _ = catalogue.members(number)["question.flac"]
            flip(made[index] / catalogue.shard_names[int(catalogue.records["shard"][number])], offset)
    return made


@pytest.fixture(scope="module")
def straight(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder, steps = tmp_path_factory.mktemp("straight"), []
    with Run(folders, folder) as run:
        for _ in range(STEPS):
            ranks = run.batches()
            run.check_accounts(batch for rank in ranks for batch in rank)
            steps.append(in_plan_order(ranks))
        return Straight(steps, run.ranks[0].record(), quarantine.merge(folder))


def attempt(
    folders: list[Path], run: Path, setting: Setting, every: int, death: tuple[int, Moment] | None
) -> int | None:
    child = _PROCESSES.Process(target=train_until, args=(folders, run, setting, STEPS, every, death))
    child.start()
    child.join(timeout=120)
    assert not child.is_alive()
    return child.exitcode


def random_setting(rng: np.random.Generator) -> Setting:
    world_size = int(rng.choice([1, 2, 3, 4]))
    return Setting(
        world_size,
        world_size * int(rng.integers(1, 3)),
        threads=int(rng.integers(1, 5)),
        prefetch=int(rng.integers(1, 6)),
    )


def digest(steps: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_at_random_moments_and_resumed_in_random_worlds_it_trains_the_same(
    folders: list[Path], straight: Straight, tmp_path: Path, trial: int
) -> None:
    rng = np.random.default_rng(trial)
    every = int(rng.integers(1, 6))
    for step in sorted(rng.choice(np.arange(1, STEPS), size=int(rng.integers(1, 3)), replace=False).tolist()):
        saves = (step + 1) % every == 0 or step + 1 == STEPS
        moments: list[Moment] = ["delivered", "committed", *(["half saved"] if saves else [])]  # type: ignore[list-item]
        death = step, moments[rng.integers(len(moments))]
        assert attempt(folders, tmp_path, random_setting(rng), every, death) == -signal.SIGKILL
    assert attempt(folders, tmp_path, random_setting(rng), every, None) == 0

    rows = [json.loads(line) for line in (tmp_path / "trained.jsonl").read_text().splitlines()]
    for row in rows:  # steps done again as well
        assert row["ids"] == straight.steps[row["step"]]
    last = {row["step"]: row["ids"] for row in rows}
    assert digest([last[step] for step in range(STEPS)]) == digest(straight.steps)
    record = json.loads((tmp_path / f"step-{STEPS:06d}.json").read_text())
    for name in ("epoch", "window", "step", "samples", "multiset", "quarantined"):
        assert record[name] == straight.record[name]
    assert quarantine.merge(tmp_path) == straight.ledger


def test_the_uninterrupted_run_is_whole_epochs_of_all_sound_samples(folders: list[Path], straight: Straight) -> None:
    stream = [name for step in straight.steps for name in step]
    epoch: Counter[str] = Counter()
    for index, folder in enumerate(folders):
        catalogue = source(folder).catalogue
        sound = set(range(catalogue.samples)) - set(DAMAGED[index])
        epoch.update({catalogue.key(number): 1 + index for number in sound})
    assert len(stream) > 2 * epoch.total()
    for number in range(2):
        assert Counter(stream[number * epoch.total() : (number + 1) * epoch.total()]) == epoch
