"""Commands that are given a run by its URL, against a real S3 server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saving import CLOCK, begin, save, store_of

from echox.cli import main
from echox.config.paths import run_dir
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import WEIGHTS, choose, list_checkpoints
from echox.engine.object_store.mirror import Mirror
from echox.engine.object_store.reading import local_run
from echox.engine.stop import STOP_FILE, reason_in
from echox.errors import CheckpointError
from echox.tracking.run import open_run
from tests.s3 import Faults


@pytest.fixture
def run(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that another machine has published two checkpoints and logs of."""
    store = store_of(bucket)
    home = tmp_path / "there" / "node-0"
    published = begin(store, home)
    for step in (1, 2):
        save(published, tmp_path / "there", step)
    progress = {"stage": "t2c", "step": 2, "steps": 9, "state": "training", "attempt": 1, "loss": 1.5, "time": 0.0}
    (home / "progress.json").write_text(json.dumps(progress))
    (home / "log").mkdir()
    event = {"time": time.time(), "event": "step", "rank": 0, "step": 2, "attempt": 1}
    (home / "log" / "rank-00000.jsonl").write_text(json.dumps(event) + "\n")
    mirror = Mirror(store, home)
    mirror.claim()
    mirror.push()
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "here"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return f"{bucket}/runs/run"


def test_weights_come_once_and_nothing_else(run: str, faults: Faults) -> None:
    faults.requests.clear()
    for _ in range(3):
        weights = load_file(find_weights(run))["weight"]
        assert torch.equal(weights, torch.full_like(weights, 2.0))
    gets = [path for method, path in faults.requests if method == "GET"]
    assert sum(path.endswith(WEIGHTS) for path in gets) == 1
    assert not any("/zero/" in path or "/rng/" in path for path in gets)


def test_weights_that_are_damaged_give_way_to_those_before(run: str, bucket: str) -> None:
    store_of(bucket).write(f"checkpoints/step-00000002.1.1/{WEIGHTS}", b"other")
    weights = load_file(find_weights(run))["weight"]
    assert torch.equal(weights, torch.full_like(weights, 1.0))


def test_checkpoints_are_listed_and_verified(run: str, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", run, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["created"], row["workers"]) for row in rows] == [(2, CLOCK, 2), (1, CLOCK, 2)]
    assert main(["checkpoint", "verify", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step-00000002": "ok", "step-00000001": "ok"}
    store_of(bucket).remove("checkpoints/step-00000002.1.1/rng/rank-00001.json")
    (Path(run_dir(f"{bucket}/runs", "run")) / "checkpoints" / "step-00000002" / "rng" / "rank-00001.json").unlink()
    assert main(["checkpoint", "verify", run, "--json"]) == 5
    verdicts = json.loads(capsys.readouterr().out)
    assert "rng/rank-00001.json is missing" in verdicts["step-00000002.1.1"] and verdicts["step-00000001"] == "ok"


def test_status_logs_and_stop(run: str, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", run]) == 0
    said = capsys.readouterr().out
    assert "2/9" in said and "step-00000002" in said and "training, attempt 1" in said
    assert main(["logs", run]) == 0
    assert "rank=0 step=2 attempt=1 step" in capsys.readouterr().out
    assert main(["stop", run]) == 0
    assert reason_in(store_of(bucket).read(STOP_FILE) or b"") == "echox stop"


@pytest.mark.parametrize(
    "words", [["status"], ["logs"], ["checkpoint", "list"], ["checkpoint", "verify"], ["evaluate"]]
)
def test_a_run_that_is_not_there_is_one_sentence(
    words: list[str], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    assert main([*words, f"{bucket}/runs/none"]) == 5
    assert "there is no run here" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="there is no run here"):
        find_weights(f"{bucket}/runs/none")


def test_commands_that_speak_and_score_bring_the_weights(run: str, bucket: str, tmp_path: Path) -> None:
    folder = local_run(run)
    assert folder == run_dir(f"{bucket}/runs", "run") and (folder / "checkpoints" / "step-00000002" / WEIGHTS).is_file()
    assert local_run(tmp_path) == tmp_path


def test_what_was_brought_is_a_run_like_any_other(run: str, bucket: str) -> None:
    find_weights(run)
    assert main(["checkpoint", "verify", run]) == 0
    folder = run_dir(f"{bucket}/runs", "run")
    chosen = choose(list_checkpoints(folder)).checkpoint
    assert chosen is not None and chosen.manifest["step"] == 2


def test_runs_in_a_store_need_a_tracking_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echox.config.load import load_recipe
    from echox.errors import RecipeError

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = load_recipe("demo/t2c", ["storage=s3://bucket/runs"])
    with pytest.raises(RecipeError, match="no folder for a tracking database"):
        open_run(recipe, {}, storage=tmp_path)
    assert list(tmp_path.iterdir()) == []
