"""Damage never shifts the order: a damaged sample leaves an empty slot, a passing failure leaves nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from echox.errors import CorruptSampleError, DataError, TransientReadError
from echox.stream import quarantine
from echox.stream.catalogue import Catalogue
from echox.stream.collate import Item
from echox.stream.quarantine import Allowance, Entry, Ledger
from tests.stream.datasets import make_dataset
from tests.stream.streaming import Collate, Run, Setting
from tests.stream.tars import flip

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", 30, per_shard=6)


def damage(folder: Path, *numbers: int, member: str = "question.flac") -> list[str]:
    """Flip a byte of samples; returns their names."""
    catalogue = Catalogue.open(folder)
    for number in numbers:
        offset, _ = catalogue.members(number)[member]
        flip(folder / catalogue.shard_names[int(catalogue.records["shard"][number])], offset)
    return [catalogue.key(number) for number in numbers]


def streamed(folder: Path, run: Path, setting: Setting | None = None, steps: int = STEPS) -> list[list[list[str]]]:
    with Run([folder], run, setting or Setting()) as attempt:
        return [attempt.train() for _ in range(steps)]


def entries(run: Path) -> list[dict[str, object]]:
    return quarantine.merge(run)


@pytest.mark.parametrize("member", ["question.flac", "json"])
def test_all_others_keep_their_slots(folder: Path, tmp_path: Path, member: str) -> None:
    before = streamed(folder, tmp_path / "sound")
    gone = damage(folder, 3, 17, member=member)
    after = streamed(folder, tmp_path / "damaged", Setting(world_size=2))
    assert after == [[[name for name in micro if name not in gone] for micro in step] for step in before]
    assert {entry["sample"] for entry in entries(tmp_path / "damaged")} == set(gone)


def test_the_ledger_says_which_sample_where_why_and_when(folder: Path, tmp_path: Path) -> None:
    before = streamed(folder, tmp_path / "sound")
    (gone,) = damage(folder, 8)
    streamed(folder, tmp_path / "run")
    found = entries(tmp_path / "run")
    due = [number + 1 for number, step in enumerate(before) if any(gone in micro for micro in step)]
    catalogue = Catalogue.open(folder)
    assert [entry["step"] for entry in found] == due and len(due) == 2
    assert [entry["epoch"] for entry in found] == [0, 1]
    first = found[0]
    assert (first["sample"], first["source"], first["kind"]) == (gone, "set", "checksum")
    assert (first["shard"], first["offset"]) == ("shard-000001.tar", int(catalogue.records["offset"][8]))
    assert f"member question.flac of sample {gone} has changed since it was indexed" in str(first["what"])


def test_what_was_read_ahead_and_never_trained_is_not_in_the_ledger(folder: Path, tmp_path: Path) -> None:
    before = streamed(folder, tmp_path / "sound", steps=3)
    second = before[1][0][0]
    catalogue = Catalogue.open(folder)
    damage(folder, next(n for n in range(30) if catalogue.key(n) == second))
    with Run([folder], tmp_path / "run", Setting(prefetch=8)) as run:
        run.train()
        run.batches()  # delivered, not committed
    assert entries(tmp_path / "run") == []


def test_a_sample_that_cannot_be_decoded_is_dropped_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = streamed(folder, tmp_path / "sound")
    real = Collate.decode

    def decode(self: Collate, item: Item) -> str:
        if item.sample.key.endswith("5"):
            raise CorruptSampleError("no audio", kind="decode")
        return real(self, item)

    monkeypatch.setattr(Collate, "decode", decode)
    after = streamed(folder, tmp_path / "run")
    assert after == [[[name for name in micro if not name.endswith("5")] for micro in step] for step in before]
    assert {entry["kind"] for entry in entries(tmp_path / "run")} == {"decode"}


def test_a_micro_batch_that_lost_all_its_samples_comes_blank(folder: Path, tmp_path: Path) -> None:
    emptied = streamed(folder, tmp_path / "sound")[1][2]
    catalogue = Catalogue.open(folder)
    numbers = {catalogue.key(number): number for number in range(catalogue.samples)}
    damage(folder, *(numbers[name] for name in emptied))
    with Run([folder], tmp_path / "run") as run:
        run.train()
        ((_, _, blank, _),) = run.batches()
        assert blank.ids == [] and blank.account is not None and blank.account.any()


def test_more_than_the_allowance_ends_the_run(folder: Path, tmp_path: Path) -> None:
    damage(folder, *range(30))
    with (
        Run([folder], tmp_path / "run", allowance=Allowance(11, 1.0)) as run,
        pytest.raises(DataError, match="12 of 12 samples were damaged .*quarantine.samples=11") as caught,
    ):
        run.train()
    assert caught.value.where == str(tmp_path / "run" / "quarantine")
    assert len(entries(tmp_path / "run")) == 12


def test_a_share_is_of_a_thousand_samples_at_least(tmp_path: Path) -> None:
    Allowance(None, 0.01).check(10, 12, tmp_path)
    Allowance(None, 0.01).check(50, 5000, tmp_path)
    for dropped, seen in ((11, 12), (51, 5000)):
        with pytest.raises(DataError, match=f"{dropped} of {seen:,} samples .*share=0.01"):
            Allowance(None, 0.01).check(dropped, seen, tmp_path)


def entry(sample: str, step: int, turn: int = 0) -> Entry:
    return Entry(sample, "set", "shard-000000.tar", 0, "checksum", "changed", 0, turn, step)


def test_ledgers_of_ranks_and_attempts_are_joined_each_visit_once(tmp_path: Path) -> None:
    Ledger(tmp_path, 0).append([entry("b", 9), entry("a", 3)])
    Ledger(tmp_path, 1).append([entry("c", 5)])
    Ledger(tmp_path, 0).append([entry("a", 3), entry("a", 3, turn=1)])  # a later attempt does step 3 again
    with (tmp_path / "quarantine" / "rank-00001.jsonl").open("a") as file:
        file.write('{"sample": "cut')
    merged = entries(tmp_path)
    assert [(row["sample"], row["turn"], row["step"]) for row in merged] == [
        *(("a", 0, 3), ("a", 1, 3), ("c", 0, 5), ("b", 0, 9))
    ]
    written = (tmp_path / "quarantine" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == merged
    assert entries(tmp_path / "none") == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_failure_that_passes_is_tried_again_and_never_dropped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    before = streamed(folder, tmp_path / "sound")
    real, left = os.pread, failures

    def unsteady(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal left
        if left and size:
            left -= 1
            raise OSError(errno.EIO, "input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", unsteady)
    if failures == 2:
        assert streamed(folder, tmp_path / "run", Setting(threads=1)) == before
    else:
        with pytest.raises(TransientReadError, match="reading failed 3 times"):
            streamed(folder, tmp_path / "run", Setting(threads=1))
    assert entries(tmp_path / "run") == []
