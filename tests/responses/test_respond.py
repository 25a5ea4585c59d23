"""Generated answers are those of Hugging Face's `generate`, for any batch and processes, and none is made twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from echox import respond as command
from echox.builders.setup import TextTools, build_setup
from echox.cli import main
from echox.config.schema import Recipe
from echox.errors import DataError, RecipeError
from echox.respond import load_s2t, respond
from echox.responses.decoding import Decoder, KeyedSampling
from echox.responses.table import ResponseTable
from tests.responses import case
from tests.stages import by_hand


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return case.make(tmp_path_factory.mktemp("case"))


@pytest.fixture
def recipe(made: Recipe, tmp_path: Path) -> Recipe:
    """The recipe on datasets without answers."""
    return copied(made, tmp_path)


def copied(made: Recipe, folder: Path) -> Recipe:
    """The recipe on a copy of its datasets."""
    changes = {}
    for name in ("train", "valid"):
        old = Path(getattr(made.data, name)[0].path)
        shutil.copytree(old, folder / name, ignore=shutil.ignore_patterns("responses"))
        changes[f"data__{name}"] = [{"path": str(folder / name), "task": "sqa"}]
    return case.change(made, storage=str(folder / "runs"), **changes)


def table(recipe: Recipe, name: str = "train") -> ResponseTable:
    (file,) = (Path(getattr(recipe.data, name)[0].path) / "responses").glob("*/responses.json")
    found = ResponseTable.find(file.parent)
    assert found is not None
    return found


def said(recipe: Recipe, name: str = "train") -> dict[int, list[int]]:
    return {number: table(recipe, name).tokens(number).tolist() for number in range(case.SAMPLES[name])}


def end_of(recipe: Recipe) -> int:
    return TextTools.load(recipe).prompt.end


def test_greedy_answers_are_those_of_hugging_face_one_by_one(recipe: Recipe) -> None:
    summary = respond(recipe)
    s2t, end = load_s2t(recipe, TextTools.load(recipe), torch.device("cpu")), end_of(recipe)
    rejected = {}
    for name in case.SAMPLES:
        lines = (table(recipe, name).folder / "rejected.jsonl").read_text().splitlines()
        rejected[name] = {row["number"]: row["reason"] for row in map(json.loads, lines)}
        for number, batch in case.batches_alone(recipe, name):
            prompt = by_hand.row_of_prompt(s2t, batch, 0)[None]
            with torch.no_grad():
                out = s2t.causal_lm.generate(
                    inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
                    max_new_tokens=case.MOST, do_sample=False, eos_token_id=end, pad_token_id=end,
                )[0].tolist()  # fmt: skip
            expected = out[: out.index(end)] if end in out else out
            reason = "cut" if len(expected) == case.MOST else ("" if expected else "empty")
            if any(expected[first : first + 6] == [expected[first]] * 6 for first in range(len(expected) - 5)):
                reason = "looping"
            assert rejected[name].get(number, "") == reason
            assert said(recipe, name)[number] == ([] if reason else expected)
    assert {"cut"} <= set(rejected["train"].values()) and len(rejected["train"]) < case.SAMPLES["train"] - 3
    assert [(one.samples, one.new) for one in summary.datasets] == [(13, 13), (4, 4)]
    assert sum(summary.datasets[0].rejected.values()) == len(rejected["train"])


def test_text_and_ids_stand_beside_the_tokens(recipe: Recipe) -> None:
    respond(recipe)
    rows = [json.loads(line) for line in (table(recipe).folder / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"id0-{number}" for number in range(13)]
    for row in rows:
        tokens = said(recipe)[row["number"]]
        assert not tokens or row["text"] == " ".join(f"w{token}" for token in tokens).replace("w11", ".")


@pytest.mark.parametrize("batch", [1, 13])
def test_sampled_answers_do_not_depend_on_the_batch(recipe: Recipe, tmp_path: Path, batch: int) -> None:
    sampled = case.change(recipe, model__echo__respond__temperature=0.7, model__echo__respond__top_p=0.9)
    respond(sampled)
    again = copied(case.change(sampled, model__echo__respond__batch=batch), tmp_path / "again")
    respond(again)
    assert said(again) == said(sampled) and any(said(sampled).values())
    other = copied(case.change(sampled, model__echo__respond__seed=18), tmp_path / "other")
    respond(other)
    assert said(other) != said(sampled)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_two_processes_make_the_table_of_one(recipe: Recipe, tmp_path: Path, temperature: float) -> None:
    one = case.change(recipe, model__echo__respond__temperature=temperature)
    respond(one)
    two = copied(one, tmp_path / "two")
    file = case.write_recipe(two, tmp_path / "two.yaml")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "echox"]
    done = subprocess.run(
        [*run, "respond", str(file), "--json"], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [one["new"] for one in json.loads(done.stdout.splitlines()[-1])["datasets"]] == [13, 4]
    assert said(two) == said(one) and said(two, "valid") == said(one, "valid")


SLOWLY = """
import sys, time
from echox import cli, respond
from echox.responses.decoding import Decoder
respond.FLUSH_S, generate = 0.0, Decoder.generate
Decoder.generate = lambda *given: time.sleep(0.3) or generate(*given)
sys.exit(cli.main(["respond", sys.argv[1]]))
"""


def test_what_a_killed_process_wrote_is_not_answered_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copied(recipe, tmp_path / "whole")
    respond(whole)
    few = case.change(recipe, model__echo__respond__batch=2)
    file = case.write_recipe(few, tmp_path / "few.yaml")
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(file)], stderr=subprocess.DEVNULL)
    parts = Path(recipe.data.train[0].path)
    deadline = time.monotonic() + 100
    while len(list(parts.glob("responses/*/parts/part-*.jsonl"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = sum(len(part.read_text().splitlines()) for part in parts.glob("responses/*/parts/part-*.jsonl"))
    assert 4 <= kept < 13
    with pytest.raises(DataError, match="are not complete"):
        build_setup(few, 0, 1)
    asked: list[str] = []
    generate = Decoder.generate
    monkeypatch.setattr(Decoder, "generate", lambda *given: asked.extend(given[2].ids) or generate(*given))
    summary = respond(few)
    assert summary.datasets[0].new == 13 - kept and len(asked) == len(set(asked)) == 13 - kept + 4
    for name in ("tokens.npy", "starts.npy", "answers.jsonl", "rejected.jsonl"):
        assert (table(few).folder / name).read_bytes() == (table(whole).folder / name).read_bytes()
    assert not (table(few).folder / "parts").exists()


def test_complete_answers_are_left_alone_without_loading_a_model(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = respond(recipe)
    monkeypatch.setattr(command, "load_s2t", None)
    second = respond(recipe)
    assert [(one.folder, one.rejected, one.new) for one in second.datasets] == [
        (one.folder, one.rejected, 0) for one in first.datasets
    ]


def test_a_folder_that_cannot_be_written_has_its_answers_under_the_storage(recipe: Recipe) -> None:
    folder = Path(recipe.data.train[0].path)
    (folder / "responses").write_text("in the way")
    respond(recipe)
    assert list(Path(recipe.storage).glob("responses/*/*/responses.json"))
    setup = build_setup(recipe, 0, 1)
    setup.train_loader.close()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model__echo__respond__max_tokens", 9, "decoding.max_tokens"),
        ("model__echo__respond__temperature", 0.5, "decoding"),
        ("model__llm__prompt__before", "w6", "prompt.before"),
        ("model__speech_encoder__margin_s", 0.2, "speech.encoder"),
    ],
)
def test_answers_of_another_identity_are_refused_before_a_model_is_loaded(
    recipe: Recipe, key: str, value: object, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echox.builders.setup.build_stage", None)
    with pytest.raises(DataError, match=r"of identity \w{12} are absent; there are no others.*run `echox respond`"):
        build_setup(recipe, 0, 1)
    respond_without_patch(recipe, monkeypatch)
    monkeypatch.setattr("echox.builders.setup.build_stage", None)
    with pytest.raises(DataError) as raised:
        build_setup(case.change(recipe, **{key: value}), 0, 1)
    assert table(recipe).folder.name in str(raised.value) and named in str(raised.value)


def respond_without_patch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    respond(recipe)


def test_other_weights_of_the_s2t_run_are_another_identity(made: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.builders import tiny_run

    respond(recipe)
    tensors = load_file(next(Path(str(made.init.s2t)).rglob("*.safetensors")))
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] + 1
    run = tiny_run.write_run(tmp_path / "s2t", tiny_run.make_recipe(tmp_path, "s2t"), tensors)
    other = case.change(recipe, init={"s2t": str(run), "t2c": made.init.t2c})
    with pytest.raises(DataError, match=r"other weights"):
        build_setup(other, 0, 1)


def test_a_recipe_of_another_stage_is_refused(made: Recipe) -> None:
    from tests.builders import tiny_run

    folder = Path(str(made.init.s2t)).parent.parent
    with pytest.raises(RecipeError, match="stage s2t"):
        respond(tiny_run.make_recipe(folder, "s2t"))


def test_the_command_says_what_it_did(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["respond", str(case.write_recipe(recipe, tmp_path / "recipe.yaml"))]) == 0
    out = capsys.readouterr()
    assert "train: 13 answers (13 new), rejected: " in out.out and "cut" in out.out
    assert "answers to " in out.err and "13/13" in out.err


def test_a_ray_job_answers_in_place_of_a_training(recipe: Recipe, tmp_path: Path) -> None:
    from launch.cli import RESPOND
    from launch.job.worker import load_object

    logged: dict[str, float] = {}
    tracker = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))
    context = SimpleNamespace(rank=0, world_size=1, local_rank=0, storage=tmp_path)
    result = load_object(RESPOND)(recipe, context, None, tracker, accept_new_data=False, allow=())
    assert (result.step, result.checkpoint, result.stopped) == (0, None, "")
    assert logged["responses/train/samples"] == 13 and 0 < logged["responses/train/rejected_share"] < 1
    assert table(recipe).samples == 13


def test_a_batch_of_training_has_the_answers_of_its_samples(recipe: Recipe, tmp_path: Path) -> None:
    respond(recipe)
    setup = build_setup(recipe, 0, 1)
    (tmp_path / "run").mkdir()
    setup.train_loader.start(step=0, run_folder=tmp_path / "run", saved=None)
    seen = set()
    for step in range(3):
        for batch in setup.train_loader.step(step):
            own_BR, mask_BR = batch.own_BR, batch.own_mask_BR
            assert len(own_BR) == len(batch.weight_B)
            for name, row, mask in zip(batch.ids, own_BR, mask_BR, strict=True):
                number = int(name.partition("-")[2])
                assert row[mask].tolist() == said(recipe)[number]
                seen.add(number)
        setup.train_loader.commit()
    setup.train_loader.close()
    assert len(seen) > 8
    (batches,) = setup.valid_loaders.values()
    found: dict[str, list[int]] = {}
    for batch in batches:
        rows: Any = zip(batch.ids, batch.own_BR, batch.own_mask_BR, strict=True)  # type: ignore[attr-defined]
        found |= {name: row[mask].tolist() for name, row, mask in rows}
    assert found == {f"id1-{number}": tokens for number, tokens in said(recipe, "valid").items()}
    assert any(name.startswith("responses-") for name in setup.files), "the run keeps which answers it had"


def test_a_nucleus_holds_the_most_probable_tokens_and_each_by_its_share() -> None:
    from echox.config.model_schema import RespondConfig

    config = RespondConfig(temperature=0.5, top_p=0.8, max_tokens=1)
    count = 4000
    logits = torch.tensor([1.0, 1.4, 0.2, 0.6])
    probable = (logits / 0.5).softmax(0)
    order = probable.argsort(descending=True)
    kept = [int(order[place]) for place in range(4) if float(probable[order[:place]].sum()) < 0.8]
    assert 1 < len(kept) < 4
    tokens = KeyedSampling(config, [str(row) for row in range(count)])(logits.expand(count, 4), 0)
    found = np.bincount(tokens.numpy(), minlength=4) / count
    for token in range(4):
        share = float(probable[token] / probable[kept].sum()) if token in kept else 0.0
        assert found[token] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("tokens", "text", "reason"),
    [
        ([1, 2, 3], "a b c", ""),
        ([], "", "empty"),
        ([5], " \n", "empty"),
        ([7] * 6, "x x", "looping"),
        ([7] * 5, "x x", ""),
        ([1, *[4, 5, 6] * 6, 2], "x", "looping"),
        (list(range(40)), "x", "cut"),
        (list(range(39)), "x", ""),
        ([3] * 40, "", "looping"),
    ],
)
def test_an_answer_is_rejected_for_a_reason(tokens: list[int], text: str, reason: str) -> None:
    from echox.config.model_schema import RespondConfig

    decoder = Decoder(RespondConfig(max_tokens=40), 2, lambda tokens: text)
    assert decoder.reason(tokens, text) == reason
