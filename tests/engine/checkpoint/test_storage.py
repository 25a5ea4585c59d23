"""Disks that are full, storage that cannot be written, files that are damaged: a sentence, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare
from safetensors.torch import load_file
from test_lifecycle import events

from echox.engine.checkpoint.checkpointer import find_checkpoint, find_weights
from echox.engine.checkpoint.manifest import list_checkpoints, step_of, verify
from echox.errors import CheckpointError

WORKER = Path(__file__).parents[1] / "worker.py"
EVERY_3 = {"engine__checkpoint_every": 3, "engine__keep": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """The runs' folder on a disk of 600 KiB."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(runs)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    yield runs
    subprocess.run(["umount", str(runs)], check=True)


def fill(disk: Path, leave: int) -> str:
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - leave))
    return str(disk / "ballast")


def test_a_full_disk_costs_one_checkpoint_and_not_the_run(folder: Path, small_disk: Path) -> None:
    options = {"ballast": fill(small_disk, 60_000), "free_at": 5}
    outcome = launch(folder, WORKER, 2, [{"name": "full", "recipe": EVERY_3, "options": options}])["full"]
    assert outcome["step"] == 10
    (failed,) = events(folder, "full", "checkpoint_failed")
    assert "the checkpoint of step 3 could not be written" in failed["why"]
    assert [step_of(path) for path in list_checkpoints(small_disk / "full")] == [10, 9, 6]
    assert all(verify(path) for path in list_checkpoints(small_disk / "full"))


def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_it_had(folder: Path, small_disk: Path) -> None:
    launch(folder, WORKER, 2, [{"name": "full", "recipe": {"optim__steps": 3}}])
    fill(small_disk, 60_000)
    scenario = {"name": "full", "recipe": EVERY_3, "allow": ["steps"]}
    outcome = launch(folder, WORKER, 2, [scenario])["full"]
    assert outcome["error"] == "CheckpointError"
    assert "could not be written" in outcome["text"] and "earlier checkpoints are untouched" in outcome["text"]
    (kept,) = list_checkpoints(small_disk / "full")
    assert step_of(kept) == 3 and verify(kept)


def test_storage_that_cannot_be_written_is_one_sentence(folder: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "file").write_text("in the way")
    outcome = launch(folder, WORKER, 2, [{"name": "file"}])["file"]
    assert outcome["error"] == "CheckpointError" and "the run's folder cannot be written" in outcome["text"]


def _damages(path: Path) -> Iterator[str]:
    """Damage a file in each way in turn, and put it back after."""
    content = path.read_bytes()
    middle = len(content) // 2
    for name, damaged in (
        ("cut", content[:middle]),
        ("flipped", content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]),
        ("deleted", None),
    ):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        yield name
        path.write_bytes(content)


def test_damage_to_any_file_of_a_real_checkpoint_falls_back(folder: Path) -> None:
    scenario: dict[str, Any] = {"name": "whole", "recipe": EVERY_3}
    launch(folder, WORKER, 2, [scenario])
    run = folder / "runs" / "whole"
    newest, before = list_checkpoints(run)[:2]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 6  # manifest, weights, and slices and random states of two ranks
    for path in files:
        for _ in _damages(path):
            choice = find_checkpoint(run)
            assert choice.checkpoint.path == before
            ((rejected, why),) = choice.rejected
            assert rejected == newest and path.name in why
    assert find_checkpoint(run).checkpoint.path == newest


def test_a_resume_past_damage_says_so_and_ends_in_the_same_weights(folder: Path) -> None:
    scenario: dict[str, Any] = {"name": "fallen", "recipe": EVERY_3, "options": {"dropout": 0.1}}
    launch(folder, WORKER, 2, [scenario])
    run = folder / "runs" / "fallen"
    expected = load_file(find_weights(run))
    slices = list_checkpoints(run)[0] / "zero" / "rank-00001.safetensors"
    slices.write_bytes(slices.read_bytes()[:-3])
    launch(folder, WORKER, 2, [scenario])
    (rejected,) = events(folder, "fallen", "checkpoint_rejected")
    assert "zero/rank-00001.safetensors has" in rejected["why"]
    assert (run / "checkpoints" / "damaged-step-00000010").is_dir()
    assert events(folder, "fallen", "resuming")[0]["step"] == 9
    assert all(torch.equal(load_file(find_weights(run))[name], tensor) for name, tensor in expected.items())


def test_only_damaged_checkpoints_are_never_trained_over(folder: Path) -> None:
    run = folder / "runs" / "lost"
    shutil.copytree(folder / "runs" / "whole", run)
    for checkpoint in list_checkpoints(run):
        (checkpoint / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        find_checkpoint(run)
    outcome = launch(folder, WORKER, 2, [{"name": "lost"}])["lost"]
    assert outcome["error"] == "CheckpointError" and len(list_checkpoints(run)) == 4
