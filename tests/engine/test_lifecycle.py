"""What a run does about bad steps, requests to stop and hangs, on two ranks of the real engine."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare, start
from oracle import plain_training
from safetensors.torch import load_file
from toy import ToyOptions, toy_recipe

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import list_checkpoints, read_manifest, step_of
from echox.engine.monitor.watchdog import HUNG

WORKER = Path(__file__).with_name("worker.py")
REWIND = {"engine__checkpoint_every": 4, "health__on_bad_step": "rewind"}
SPIKES = {"health__spike_sigma": 6, "health__spike_window": 8}
OFTEN = {"engine__checkpoint_every": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("lifecycle"))


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, Any]:
    dropout = {"dropout": 0.1}
    return launch(
        folder,
        WORKER,
        2,
        [
            {"name": "skipped", "recipe": {}, "options": {"bad_data_at": 3}},
            {"name": "rewound", "recipe": REWIND, "options": {"bad_data_at": 6}},
            {"name": "spiked", "recipe": SPIKES, "options": {"spike_at": 8}},
            {"name": "worn", "recipe": {"health__max_bad_steps": 1, **OFTEN}, "options": {"nan_from": 6}},
            {"name": "kept", "recipe": {"engine__checkpoint_every": 2, "engine__keep": 1, "engine__keep_every": 4}},
            {"name": "straight", "recipe": {}, "options": dropout},
            {"name": "stopped", "recipe": {}, "options": {**dropout, "term_at": 6}},
            {"name": "checked", "recipe": {}, "options": {**dropout, "term_in_validation": True}},
        ],
    )


@pytest.fixture(scope="module")
def second(folder: Path, first: dict[str, Any]) -> dict[str, Any]:
    dropout = {"dropout": 0.1}
    return launch(folder, WORKER, 2, [{"name": name, "options": dropout} for name in ("stopped", "checked")])


def events(folder: Path, run: str, event: str, rank: int = 0) -> list[dict[str, Any]]:
    lines = (folder / "runs" / run / "log" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a full disk cuts lines short
            found.append(json.loads(line))
    return [record for record in found if record["event"] == event]


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(find_weights(folder / "runs" / run))


def oracle(folder: Path, data_steps: list[int | None]) -> dict[str, torch.Tensor]:
    """Weights after plain PyTorch has trained on the data of these steps."""
    return plain_training(toy_recipe("oracle", folder / "ds.json"), ToyOptions(), data_steps)[0]


def assert_like(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_bad_step_changes_no_weight_and_no_moment(folder: Path, first: dict[str, Any]) -> None:
    assert first["skipped"]["step"] == 10
    assert_like(weights(folder, "skipped"), oracle(folder, [0, 1, 2, None, 4, 5, 6, 7, 8, 9]))
    (bad,) = events(folder, "skipped", "bad_step", rank=1)
    assert bad["step"] == 4 and "loss/ctc, loss/s2t, loss/total is not a finite number" in bad["why"]
    manifest = read_manifest(list_checkpoints(folder / "runs" / "skipped")[0])
    assert manifest["updates"] == 9 and manifest["cursor"]["health"]["bad_steps"] == 1


def test_going_back_passes_over_the_data_of_the_bad_steps(folder: Path, first: dict[str, Any]) -> None:
    (rewind,) = events(folder, "rewound", "rewind", rank=1)
    assert (rewind["step"], rewind["bad_step"], rewind["steps_passed_over"]) == (4, 7, 3)
    assert_like(weights(folder, "rewound"), oracle(folder, [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]))
    steps = [json.loads(line) for line in (folder / "runs" / "rewound" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss/total" in row] == list(range(1, 11))


def test_a_spike_is_passed_over_before_it_is_learnt(folder: Path, first: dict[str, Any]) -> None:
    (bad,) = events(folder, "spiked", "bad_step")
    assert bad["step"] == 9 and "is a spike" in bad["why"]
    assert_like(weights(folder, "spiked"), oracle(folder, [0, 1, 2, 3, 4, 5, 6, 7, None, 9]))


def test_too_many_bad_steps_end_the_run_and_keep_its_checkpoint(folder: Path, first: dict[str, Any]) -> None:
    assert "step 8 (more than health.max_bad_steps=1 bad steps in a row)" in first["worn"]["text"]
    assert find_weights(folder / "runs" / "worn").parent.name == "step-00000005"


def test_retention_keeps_the_newest_and_every_fourth(folder: Path, first: dict[str, Any]) -> None:
    assert [step_of(path) for path in list_checkpoints(folder / "runs" / "kept")] == [10, 8, 4]


@pytest.mark.parametrize(("run", "earliest"), [("stopped", 7), ("checked", 5)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_that_goes_on_bit_for_bit(
    folder: Path, first: dict[str, Any], second: dict[str, Any], run: str, earliest: int
) -> None:
    assert first[run]["stopped"] == "SIGTERM"
    assert earliest <= first[run]["step"] <= earliest + 1
    assert first[run]["checkpoint"].endswith(f"step-{first[run]['step']:08d}")
    assert events(folder, run, "stopped", rank=1)
    assert second[run]["step"] == 10 and second[run]["stopped"] == ""
    straight = weights(folder, "straight")
    assert all(torch.equal(weights(folder, run)[name], tensor) for name, tensor in straight.items())


def test_a_hang_leaves_the_stacks_of_every_rank(folder: Path) -> None:
    recipe = {"health__hang_least_s": 0.5, "health__hang_factor": 2, "optim__steps": 20}
    ranks = start(folder, WORKER, 2, [{"name": "hung", "recipe": recipe, "options": {"sleep_at": 12}}])
    codes = ranks.wait(60)
    assert HUNG in codes, ranks.said()
    stacks = {path.name[-9:-4]: path.read_text() for path in (folder / "runs" / "hung" / "hangs").glob("*.txt")}
    assert set(stacks) == {"00000", "00001"}
    assert "toy.py" in stacks["00000"] and "all_reduce" in stacks["00001"]
    for rank in range(2):
        (hang,) = events(folder, "hung", "hang", rank)
        assert hang["step"] == 12 and hang["waited_s"] >= 0.5
