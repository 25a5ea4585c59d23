"""The teacher's labels are shared by the runs of a storage, never between teachers, and none gets lost."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from echox.builders.labels import LabelFile, keep_labels, teacher_identity
from echox.config.load import load_recipe
from echox.stages.echo import EchoStage
from echox.stages.labels import Label
from tests import tiny
from tests.stages import test_by_hand as usual
from tests.stages.test_readings import Counting

RANKS, ROUNDS, AT_ONCE = 2, 25, 20


def run(
    monkeypatch: pytest.MonkeyPatch, name: str, storage: object, labels: str = "cached", rank: int = 0, **echo: Any
) -> tuple[EchoStage, Counting]:
    """The stage of a run as it begins, and its teacher, which counts."""
    recipe = load_recipe("3b/echo", [f"name={name}", f"storage={storage}", "engine.frozen_placement=replicate"])
    update = {"echo": recipe.model.echo.model_copy(update={"labels": labels})}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
    cut = {"mode": "fixed", "fixed_tokens": 3}
    stage = usual.make_stage("reference", labels=labels, segmentation=cut, **echo).eval()
    keep_labels(recipe, stage, rank)
    teacher = Counting(stage)
    monkeypatch.setattr(stage.teacher, "forward", teacher)
    return stage, teacher


def passes(stage: EchoStage) -> list[torch.Tensor]:
    """Losses of two batches."""
    batch = usual.make_batch(stage)
    parts = [tiny.rows_of(batch, rows) for rows in ([0, 1], [2, 1, 5])]
    return [stage(dataclasses.replace(part, targets=None))["echo"].total for part in parts]


def test_a_second_run_with_the_same_teacher_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, taught = run(monkeypatch, "first", tmp_path)
    losses = passes(first)
    assert taught.segments > 0
    for name, rank in (("second", 0), ("first", 1), ("second", 1)):
        stage, teacher = run(monkeypatch, name, tmp_path, rank=rank)
        assert all(torch.equal(*pair) for pair in zip(passes(stage), losses, strict=True))
        assert teacher.segments == 0, f"{name}, rank {rank}"
    assert sorted(path.name for path in (tmp_path / "labels" / teacher_identity(first)).iterdir()) == ["first"]
    # Another storage has its own.
    _, elsewhere = made = run(monkeypatch, "second", tmp_path / "elsewhere")
    passes(made[0])
    assert elsewhere.segments == taught.segments


@pytest.mark.parametrize("other", ["weights", "limit"])
def test_another_teacher_decodes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    first, taught = run(monkeypatch, "first", tmp_path)
    passes(first)
    plain = usual.make_stage
    if other == "weights":

        def changed(*args: Any, **options: Any) -> EchoStage:
            stage = plain(*args, **options)
            with torch.no_grad():
                stage.teacher.decoder.head.weight[0, 0] += 1e-3
            return stage

        monkeypatch.setattr(usual, "make_stage", changed)
    second, teacher = run(monkeypatch, "second", tmp_path, **({"units_per_token": 3.5} if other == "limit" else {}))
    passes(second)
    assert teacher.segments == taught.segments > 0
    folders = sorted(path.name for path in (tmp_path / "labels").iterdir())
    assert folders == sorted({teacher_identity(first), teacher_identity(second)}) and len(folders) == 2


def test_drafts_come_from_other_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(monkeypatch, "first", tmp_path)
    passes(first)
    second, _ = run(monkeypatch, "second", tmp_path, labels="drafted")
    passes(second)
    assert float(second.metrics()["teacher/drafted_share"]) > 0


def test_runs_in_an_object_store_share_what_lies_on_their_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    first, _ = run(monkeypatch, "first", "s3://bucket/runs")
    passes(first)
    second, teacher = run(monkeypatch, "second", "s3://bucket/runs")
    passes(second)
    assert teacher.segments == 0
    other, asked = run(monkeypatch, "second", "s3://other/runs")
    passes(other)
    assert asked.segments > 0 and [path.name for path in tmp_path.iterdir()] == ["cache"]


def labels_of(run: int, rank: int, round_: int) -> dict[tuple[int, ...], Label]:
    """Labels of some 100 kB, which no single write holds."""
    own = (run, rank, round_)
    return {(*own, number): Label([*own, *range(number, number + 1000)], True) for number in range(AT_ONCE)}


def write(folder: Path, run: int, rank: int, start: Any) -> None:
    file = LabelFile(folder, f"run-{run}", rank)
    start.wait()
    for round_ in range(ROUNDS):
        file.add(labels_of(run, rank, round_))


def test_runs_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    start = forked.Barrier(2 * RANKS + 1)
    writers = [
        forked.Process(target=write, args=(tmp_path, run, rank, start)) for run in range(2) for rank in range(RANKS)
    ]
    wanted: dict[tuple[int, ...], Label] = {}
    for run_ in range(2):
        for rank in range(RANKS):
            for round_ in range(ROUNDS):
                wanted |= labels_of(run_, rank, round_)
    for writer in writers:
        writer.start()
    start.wait()
    sizes = []
    while any(writer.is_alive() for writer in writers):
        file = LabelFile(tmp_path, "reader", 0)
        sizes.append(len(file))
        assert all(file.get(tokens) in (None, label) for tokens, label in wanted.items()), "half of one is none"
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    file = LabelFile(tmp_path, "reader", 0)
    assert len(file) == len(wanted) == 2 * RANKS * ROUNDS * AT_ONCE
    assert all(file.get(tokens) == label for tokens, label in wanted.items())
    assert sizes == sorted(sizes)
    # Where several nodes add to one file of a shared folder, the kernel of none keeps them apart.
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    assert files == [f"run-{run_}/rank-{rank:05d}.jsonl" for run_ in range(2) for rank in range(RANKS)]


def test_what_is_no_file_of_labels_is_passed_over(tmp_path: Path) -> None:
    LabelFile(tmp_path, "first", 0).add({(1, 2): Label([3], True)})
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "rank-00000.jsonl")
    (tmp_path / "folder" / "rank-00000.jsonl").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "rank-00000.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "rank-00000.jsonl").write_bytes(
        b"\xff\xfe\n[[1], [2]]\n{}\n[[-1], [2], true]\n[[5], [6], true]\n"
    )
    file = LabelFile(tmp_path, "second", 0)
    assert len(file) == 2 and file.get((1, 2)) == Label([3], True) and file.get((5,)) == Label([6], True)
