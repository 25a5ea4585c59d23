"""A run that answers again: with its own weights, once an epoch, and the same after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echox.builders.setup import TextTools, build_stage, load_tensors
from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.respond import respond
from echox.responses.table import ResponseTable
from tests.responses import case
from tests.stages import by_hand

WORKER = Path(__file__).with_name("refresh_worker.py")
STEPS = 6
"""Of four samples at most, of 13 in an epoch, which has four steps."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = case.make(tmp_path_factory.mktemp("case"), refresh_every=1)
    made = case.change(
        made,
        optim__steps=STEPS,
        optim__lr__lora=4e-3,
        engine__checkpoint_every=2,
        engine__keep=9,
        data__window_shards=9,
    )
    respond(made)
    return made


def launched(recipe: Recipe, folder: Path, *command: str) -> None:
    """Run a command on the recipe, which is written into the folder."""
    file = case.write_recipe(recipe, folder / "recipe.yaml")
    words = [sys.executable, *(str(file) if word == "RECIPE" else word for word in command)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def tables(run: Path) -> dict[str, ResponseTable]:
    """Answers of a run by the name of their step."""
    found = {
        file.parent.parent.name: ResponseTable.find(file.parent) for file in run.glob("responses/*/*/responses.json")
    }
    return {name: table for name, table in sorted(found.items()) if table is not None}


def losses(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("loss/")} for row in rows if "loss/s2t" in row]


@pytest.fixture(scope="module")
def runs(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two runs: `whole`, and `5`, which ended after that step and was begun again from checkpoint 4."""
    folder = tmp_path_factory.mktemp("runs")
    launched(recipe, folder, str(WORKER), "RECIPE", str(folder), "5")
    return folder


def greedy(recipe: Recipe, checkpoint: Path) -> dict[int, list[int]]:
    """Answers of the weights of a checkpoint, token by token from whole forwards."""
    text = TextTools.load(recipe)
    stage: Any = build_stage(recipe, text).eval()
    load_tensors(stage, load_file(find_weights(checkpoint)))
    with torch.no_grad():
        return {
            number: by_hand.own_answer(
                stage.s2t, by_hand.row_of_prompt(stage.s2t, batch, 0), text.prompt.end, case.MOST
            )
            for number, batch in case.batches_alone(recipe, "train")
        }


def check_answers(recipe: Recipe, run: Path, step: int) -> None:
    table = tables(run)[f"step-{step:08d}"]
    expected = greedy(recipe, run / "checkpoints" / f"step-{step:08d}")
    lines = (table.folder / "rejected.jsonl").read_text().splitlines()
    rejected = {json.loads(line)["number"] for line in lines}
    assert len(rejected) < len(expected)
    for number, tokens in expected.items():
        assert table.tokens(number).tolist() == ([] if number in rejected else tokens)


def test_an_epoch_ends_with_answers_of_the_weights_of_that_step(recipe: Recipe, runs: Path) -> None:
    whole = runs / "whole" / recipe.name
    assert list(tables(whole)) == ["step-00000004"]
    check_answers(recipe, whole, 4)
    (first,) = (Path(recipe.data.train[0].path) / "responses").glob("*/tokens.npy")
    assert (tables(whole)["step-00000004"].folder / "tokens.npy").read_bytes() != first.read_bytes()


@pytest.mark.parametrize("step", [5, pytest.param(4, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(recipe: Recipe, runs: Path, step: int) -> None:
    if step == 4:  # before checkpoint 4 is there, so that its answers are made again
        launched(recipe, runs, str(WORKER), "RECIPE", str(runs), "4")
    run, whole = (runs / name / recipe.name for name in (str(step), "whole"))
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    ours, theirs = (load_file(find_weights(folder)) for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(theirs) > 20
    assert list(tables(run)) == list(tables(whole))


@pytest.mark.slow
def test_two_ranks_of_zero_3_answer_with_their_present_weights(recipe: Recipe, tmp_path: Path) -> None:
    mine = case.change(recipe, storage=str(tmp_path), engine__frozen_placement="shard")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launched(mine, tmp_path, *torchrun, "-m", "echox", "train", "RECIPE")
    run = tmp_path / mine.name
    check_answers(recipe, run, 4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = [row["perf/zero_trace_invalidations"] for row in rows if "perf/zero_trace_invalidations" in row]
    assert counts[-1] == counts[2]
