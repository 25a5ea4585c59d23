"""Damage never shifts the order: a damaged sample leaves an empty slot, a passing failure leaves nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
from echox.errors import DataError, TransientReadError
from echox.stream import quarantine
from echox.stream.batch import SpeechBatch
from echox.stream.collate import PromptTokens, SpeechCollate
from echox.stream.format import scan
from echox.stream.format.catalogue import Catalogue
from echox.stream.format.writer import write_shards
from echox.stream.quarantine import Allowance, Entry, Ledger
from echox.stream.sampling.batching import SampleBudget
from echox.stream.sampling.plan import Plan
from tests.stream.datasets import make_dataset, source
from tests.stream.streaming import Run, Setting
from tests.stream.tars import flip, header_of

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


def numbers_of(folder: Path) -> dict[str, int]:
    catalogue = Catalogue.open(folder)
    return {catalogue.key(number): number for number in range(catalogue.samples)}


def streamed(folder: Path, run: Path, setting: Setting | None = None, steps: int = STEPS) -> list[list[list[str]]]:
    with Run([folder], run, setting or Setting()) as attempt:
        return [attempt.train() for _ in range(steps)]


def without(stream: list[list[list[str]]], gone: Sequence[str]) -> list[list[list[str]]]:
    return [[[name for name in micro if name not in gone] for micro in step] for step in stream]


def entries(run: Path) -> list[dict[str, Any]]:
    """What the ledgers of all ranks hold."""
    return quarantine.merge(run)


@pytest.mark.parametrize("member", ["question.flac", "json"])
def test_all_others_keep_their_slots(folder: Path, tmp_path: Path, member: str) -> None:
    before = streamed(folder, tmp_path / "sound")
    gone = damage(folder, 3, 17, member=member)
    after = streamed(folder, tmp_path / "damaged", Setting(world_size=2))
    assert after == without(before, gone)
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
    first, second, *_ = streamed(folder, tmp_path / "sound", steps=3)
    numbers = numbers_of(folder)
    damage(folder, numbers[first[0][0]], *(numbers[name] for micro in second for name in micro))
    with Run([folder], tmp_path / "run", Setting(prefetch=8)) as run:
        run.train()
        run.batches()  # delivered, not committed
    assert [entry["sample"] for entry in entries(tmp_path / "run")] == [first[0][0]]


def test_a_step_done_again_on_other_ranks_is_one_entry_of_the_merged_ledger(folder: Path, tmp_path: Path) -> None:
    damage(folder, *range(0, 30, 4))
    streamed(folder, tmp_path / "straight")
    with Run([folder], tmp_path / "run", Setting(world_size=4)) as run:
        for _ in range(2):
            run.train()
        saved = run.ranks[0].record()
        for _ in range(2):
            run.train()
    with Run([folder], tmp_path / "run", Setting(world_size=2), saved, 2) as run:
        for _ in range(STEPS - 2):
            run.train()
    ledgers = (tmp_path / "run" / "quarantine").glob("rank-*")
    assert sum(len(path.read_text().splitlines()) for path in ledgers) > len(entries(tmp_path / "run"))
    assert entries(tmp_path / "run") == entries(tmp_path / "straight")


@pytest.mark.parametrize(("end", "kind"), [("cut", "truncated"), ("zeroed", "checksum")])
def test_of_a_shard_that_lost_its_end_only_the_samples_there_are_dropped(
    folder: Path, tmp_path: Path, end: str, kind: str
) -> None:
    before = streamed(folder, tmp_path / "sound")
    catalogue, shard = Catalogue.open(folder), folder / "shard-000001.tar"
    gone = [catalogue.key(number) for number in (9, 10, 11)]
    with Run([folder], tmp_path / "run") as run:
        size, (offset, length) = shard.stat().st_size, catalogue.members(9)["question.flac"]
        os.truncate(shard, offset + length - 1)
        if end == "zeroed":
            os.truncate(shard, size)
        after = [run.train() for _ in range(STEPS)]
    assert after == without(before, gone)
    assert {(entry["sample"], entry["kind"]) for entry in entries(tmp_path / "run")} == {(name, kind) for name in gone}


def test_a_tar_header_damaged_after_the_index_was_made_loses_nothing(folder: Path, tmp_path: Path) -> None:
    before = streamed(folder, tmp_path / "sound")
    shard, name = folder / "shard-000001.tar", Catalogue.open(folder).key(8)
    flip(shard, header_of(shard, f"{name}.json") + 3)
    assert streamed(folder, tmp_path / "run") == before
    assert entries(tmp_path / "run") == [] and not (tmp_path / "run").exists()


def test_samples_that_can_be_read_and_not_used_are_dropped_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their checksums are right: they were written so, and indexed by something that did not look at texts."""
    wave = np.sin(np.arange(3200) / 9).astype(np.float32) * 0.3
    samples: list[dict[str, Any]] = [
        {
            "__key__": f"s{n}",
            "question.flac": encode_flac(wave),
            "json": {"question_s": 0.2, "question_text": "q", "answer_text": "a"},
        }
        for n in range(8)
    ]
    samples[1]["question.flac"] = encode_flac(wave)[:-200]
    del samples[4]["question.flac"]
    samples[6]["json"] = {"question_s": 0.2, "question_text": ["q"], "answer_text": "a"}
    samples[7]["json"] = {"question_s": 0.2, "question_text": "q", "answer_text": ""}
    monkeypatch.setattr(scan, "_text", lambda meta, name: "")
    write_shards(tmp_path / "set", samples, per_shard=3, optional=["question.flac"])
    collate = SpeechCollate(lambda text: [ord(c) for c in text], PromptTokens([1], [2], [3], 4), LogMel(80), 16000)
    plan = Plan([source(tmp_path / "set")], seed=1, budget=SampleBudget(8, 8))
    with Run([tmp_path / "set"], tmp_path / "run", Setting(micro_batches=8), collate=collate, plan=plan) as run:
        (batches,) = run.batches()
        (metrics,) = run.check_accounts(batches)
    assert sorted(name for batch in batches for name in batch.ids) == ["s0", "s2", "s3", "s5"]
    blank = [cast(SpeechBatch, batch) for batch in batches if not batch.ids]
    assert len(batches) == 8 and [batch.weight_B.tolist() for batch in blank] == [[0.0]] * 4
    kinds = {"s1": "decode", "s4": "member", "s6": "schema", "s7": "empty"}
    assert {row["sample"]: row["kind"] for row in entries(tmp_path / "run")} == kinds
    assert [metrics[f"data/quarantined/{kind}"] for kind in kinds.values()] == [1, 1, 1, 1]
    assert (metrics["data/samples"], metrics["data/set-sqa/samples"], metrics["data/quarantined"]) == (8, 4, 4)


def test_a_micro_batch_that_lost_all_its_samples_comes_blank(folder: Path, tmp_path: Path) -> None:
    emptied = streamed(folder, tmp_path / "sound")[1][2]
    damage(folder, *(numbers_of(folder)[name] for name in emptied))
    with Run([folder], tmp_path / "run") as run:
        run.train()
        (batches,) = run.batches()
        run.check_accounts(batches)
    assert [bool(batch.ids) for batch in batches] == [True, True, False, True]
    assert len(entries(tmp_path / "run")) == len(emptied)


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


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_cut_short_by_a_crash_costs_no_other_line(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path, 0)
    ledger.append([entry("a", 1), entry("b", 2)])
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    Ledger(tmp_path, 0).append([entry("b", 2)])  # done again
    Ledger(tmp_path, 0).append([entry("c", 3)])
    assert [row["sample"] for row in entries(tmp_path)] == ["a", "b", "c"]


def test_entries_of_one_step_come_in_one_order_whichever_rank_wrote_them(tmp_path: Path) -> None:
    rows = [entry("a", 1, turn=0), entry("a", 1, turn=1), entry("b", 1)]
    for run, order in (("one", rows), ("other", rows[::-1])):
        for rank, row in enumerate(order):
            Ledger(tmp_path / run, rank).append([row])
    assert entries(tmp_path / "one") == entries(tmp_path / "other")


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


def test_a_shard_that_is_gone_ends_the_run_and_is_no_damage(folder: Path, tmp_path: Path) -> None:
    with Run([folder], tmp_path / "run") as run, pytest.raises(DataError, match="the shard cannot be read") as caught:
        (folder / "shard-000002.tar").unlink()
        for _ in range(STEPS):
            run.train()
    assert caught.value.where == str(folder / "shard-000002.tar")
    assert entries(tmp_path / "run") == []
