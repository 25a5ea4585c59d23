"""Files that a run keeps beside its checkpoints: copied once, in every manifest, the same on every rank and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch, prepare

from echox.engine.checkpoint.manifest import read_manifest, write_manifest
from echox.engine.run_files import RunFile, compare, describe, store
from echox.errors import CheckpointError

WORKER = Path(__file__).parent / "run_files_worker.py"
SAME = ["one first", "one first"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run-files"))


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    scenarios = [
        {"name": "run", "texts": SAME, "die_at": 2},
        {"label": "changed", "name": "run", "texts": ["two first", "two first"]},
        {"label": "ranks", "name": "run", "texts": ["one first", "two first"]},
        {"name": "learned", "texts": SAME, "learned": [3.25, 3.5]},
        {"label": "rewritten", "name": "run", "texts": ["one again", "one again"]},
        {"name": "old", "texts": SAME, "die_at": 2},
    ]
    first = launch(folder, WORKER, 2, scenarios)
    # As it was written before manifests had such entries.
    checkpoint = folder / "runs/old/checkpoints/step-00000002"
    found: dict[str, Any] = dict(read_manifest(checkpoint))
    found.pop("version"), found.pop("run_files")
    write_manifest(checkpoint, found, found.pop("files"))  # type: ignore[arg-type]
    again = {"label": "old goes on", "name": "old", "texts": ["two now", "two now"]}
    return {**first, **launch(folder, WORKER, 2, [again])}


def manifest(folder: Path, run: str, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"runs/{run}/checkpoints/step-{step:08d}/manifest.json").read_text())
    return found


def test_a_file_is_in_the_folder_of_the_run_and_in_its_manifests(folder: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes["run"] == {"killed": True} and outcomes["rewritten"] == {"step": 4}
    (entry,) = manifest(folder, "run", 2)["run_files"].values()
    assert entry["about"] == {"word": "one"} and len(entry["sha256"]) == 64
    assert manifest(folder, "run", 4)["run_files"] == {"words.txt": entry}
    # What the weights depend on is the same: the resume takes the newer text.
    assert (folder / "runs/run/words.txt").read_text() == "one again"


def test_a_resume_with_another_file_is_refused(folder: Path, outcomes: dict[str, Any]) -> None:
    said = outcomes["changed"]
    assert said["error"] == "CheckpointError"
    assert "words.txt is not the one the checkpoint was trained with: sha256 " in said["text"]
    assert str(folder / "runs/run/words.txt") in said["text"] and str(folder / "words-0.txt") in said["text"]


def test_ranks_with_different_files_are_refused(outcomes: dict[str, Any]) -> None:
    assert outcomes["ranks"]["error"] == "DataError"
    assert "rank 1 has other contents than rank 0 in words.txt" in outcomes["ranks"]["text"]


def test_ranks_that_learned_different_things_of_one_file_are_refused(outcomes: dict[str, Any]) -> None:
    assert outcomes["learned"]["error"] == "DataError"
    assert "rank 1 has other contents than rank 0 in words.txt" in outcomes["learned"]["text"]


def test_a_note_of_the_setup_is_one_event_of_each_attempt(folder: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes["rewritten"] == {"step": 4}
    lines = (folder / "runs/run/log/rank-00000.jsonl").read_text().splitlines()
    said = [event["what"] for event in map(json.loads, lines) if event["event"] == "word"]
    assert said == ["it is one", "it is one"], "when it began and when it went on; refused attempts did not come so far"


def test_an_older_checkpoint_goes_on_and_says_so(folder: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes["old"] == {"killed": True} and outcomes["old goes on"] == {"step": 4}
    assert "run_files" not in manifest(folder, "old", 2)
    assert manifest(folder, "old", 4)["run_files"]["words.txt"]["about"] == {"word": "two"}
    for run, said in (("old", [["words.txt"]]), ("run", [])):
        lines = (folder / f"runs/{run}/log/rank-00000.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "warning_run_files"]
        assert [event["not_in_the_checkpoint"] for event in events] == said


def test_compare_and_store(tmp_path: Path) -> None:
    path, run = tmp_path / "a.json", tmp_path / "run"
    run.mkdir()
    path.write_text("{}")
    files = {"a.json": RunFile(path=path, sha256="11", about={"of": "x"})}
    saved = describe(files)
    assert saved == {"a.json": {"sha256": "11", "about": {"of": "x"}}}
    for known in (saved, {}, {"gone.json": saved["a.json"]}):
        compare(known, files, run)
    other = {"a.json": RunFile(path=path, sha256="22")}
    with pytest.raises(CheckpointError, match=r"a\.json is not the one.*sha256 22 now, 11 then.*name the copy"):
        compare(saved, other, run)
    store(files, run)
    date = (run / "a.json").stat().st_mtime_ns
    store(files, run)
    assert (run / "a.json").read_text() == "{}" and (run / "a.json").stat().st_mtime_ns == date
    assert [file.name for file in run.iterdir()] == ["a.json"]
