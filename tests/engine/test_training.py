"""The engine on real processes: torchrun, gloo, DeepSpeed ZeRO-3; a plain PyTorch loop is the oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare
from oracle import plain_training
from safetensors.torch import load_file
from toy import ToyOptions, ToyStage, toy_recipe

from echox.engine.checkpoint.checkpointer import find_weights

pytestmark = pytest.mark.timeout(900)  # The launches of the fixture count into the first test.

WORKER = Path(__file__).parent / "worker.py"
CLIP = {"optim__clip": 0.25}
EVERY_5 = {"engine__checkpoint_every": 5, "engine__keep": 3}
DROPOUT = {"dropout": 0.3}


@dataclass
class Launched:
    """The storage after all launches, and each launch's outcomes by scenario."""

    folder: Path
    first: dict[str, Any]
    alone: dict[str, Any]
    second: dict[str, Any]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(find_weights(self.folder / "runs" / run))

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "runs" / run / "checkpoints" / f"step-{step:08d}"

    def metrics(self, run: str) -> list[dict[str, float]]:
        lines = (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss/total" in record]

    def events(self, run: str, event: str, rank: int = 0) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / run / "log" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = prepare(tmp_path_factory.mktemp("engine"))
    first = launch(
        folder,
        WORKER,
        2,
        [
            {"name": "two", "recipe": {**CLIP, **EVERY_5}},
            {"name": "two-gas", "recipe": {**CLIP, "data__micro_batch": 2}},
            {"name": "two-counted-late", "recipe": CLIP, "options": {"known": False}},
            {
                "name": "two-gas-counted-late",
                "recipe": {**CLIP, **EVERY_5, "data__micro_batch": 2},
                "options": {"known": False},
            },
            {"name": "two-shard", "recipe": {**CLIP, "engine__frozen_placement": "shard"}},
            {"name": "two-grown", "recipe": {**CLIP, "data__global_batch": 4, "data__batch_for": 1}},
            {"name": "two-skip", "recipe": CLIP, "options": {"skip_odd_steps": True}},
            {"name": "straight", "recipe": EVERY_5, "options": DROPOUT},
            {"name": "halves", "recipe": EVERY_5, "options": DROPOUT, "die_at": 5},
            {"name": "damaged", "recipe": EVERY_5, "options": DROPOUT},
            {"name": "wrong", "recipe": {"optim__steps": 3}, "options": {"dead": True, "leak": True}},
            {"name": "grown", "recipe": {"optim__steps": 3}},
            {
                "name": "nan",
                "recipe": {
                    "optim__steps": 4,
                    "engine__checkpoint_every": 2,
                    "health__on_bad_step": "stop",
                },
                "options": {"nan_at": 2},
            },
            {"name": "fewer", "recipe": {**CLIP, **EVERY_5}, "die_at": 5},
        ],
    )
    newest = folder / "runs" / "damaged" / "checkpoints" / "step-00000010" / "trainable.safetensors"
    newest.write_bytes(_flipped(newest.read_bytes()))
    alone = launch(
        folder,
        WORKER,
        1,
        [
            {"name": "one", "recipe": {**CLIP, "data__micro_batch": 8}},
            {"name": "fewer", "recipe": {**CLIP, **EVERY_5}},
            {"name": "more", "recipe": {**CLIP, **EVERY_5}, "die_at": 5},
        ],
    )
    second = launch(
        folder,
        WORKER,
        2,
        [
            {"name": "halves", "recipe": EVERY_5, "options": DROPOUT},
            {"name": "damaged", "recipe": EVERY_5, "options": DROPOUT},
            {"name": "two", "recipe": {**CLIP, **EVERY_5}},
            {"name": "more", "recipe": {**CLIP, **EVERY_5}},
            {"name": "grown", "label": "longer", "recipe": {"optim__steps": 4}},
            {"name": "grown", "label": "refused", "recipe": {"optim__steps": 4}, "data": "other", "allow": ["steps"]},
            {
                "name": "grown",
                "recipe": {"optim__steps": 4, "optim__lr": {"lora": 0.03}},
                "data": "other",
                "accept": True,
                "allow": ["steps", "lr"],
            },
        ],
    )
    return Launched(folder, first, alone, second)


def _flipped(content: bytes) -> bytes:
    middle = len(content) - 7
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def oracle(folder: Path, options: ToyOptions) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Ten steps in plain PyTorch: weights and losses."""
    return plain_training(toy_recipe("oracle", folder / "ds.json", **CLIP), options, range(10))


RUNS = ("one", "two", "two-gas", "two-counted-late", "two-gas-counted-late", "two-shard", "two-grown")


@pytest.mark.parametrize("run", RUNS)
def test_ten_steps_equal_plain_pytorch(launched: Launched, run: str) -> None:
    weights, losses = oracle(launched.folder, ToyOptions())
    found = launched.weights(run)
    assert found.keys() == {*weights, "classes"}
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert [record["loss/total"] for record in launched.metrics(run)] == pytest.approx(losses, rel=1e-5)


def test_a_batch_that_grows_with_the_ranks_says_so_before_the_first_step(launched: Launched) -> None:
    names = [json.loads(line)["event"] for line in _log(launched, "two-grown")]
    assert names.index("batch") < names.index("start") and "batch" not in [
        json.loads(line)["event"] for line in _log(launched, "two")
    ]
    (event,) = launched.events("two-grown", "batch")
    assert event["what"].startswith("a step has 8 samples on 2 ranks, 2 times the 4 for 1")


def _log(launched: Launched, run: str) -> list[str]:
    return (launched.folder / "runs" / run / "log" / "rank-00000.jsonl").read_text().splitlines()


def test_clipping_was_in_force(launched: Launched) -> None:
    assert max(record["grad_norm"] for record in launched.metrics("two")) > CLIP["optim__clip"]


def test_a_loss_without_tokens_leaves_no_stale_gradient(launched: Launched) -> None:
    weights, losses = oracle(launched.folder, ToyOptions(skip_odd_steps=True))
    found = launched.weights("two-skip")
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=2e-6)
    assert [record["loss/total"] for record in launched.metrics("two-skip")] == pytest.approx(losses, rel=1e-5)


def test_both_placements_of_frozen_weights_agree(launched: Launched) -> None:
    replicated, sharded = launched.weights("two"), launched.weights("two-shard")
    for name, expected in replicated.items():
        torch.testing.assert_close(sharded[name], expected, rtol=1e-6, atol=1e-7)


def test_five_and_five_resumed_equal_ten_straight_bit_for_bit(launched: Launched) -> None:
    assert launched.first["halves"] == {"killed": True}
    assert launched.second["halves"]["step"] == 10
    straight, halves = launched.weights("straight"), launched.weights("halves")
    assert all(torch.equal(halves[name], tensor) for name, tensor in straight.items())
    keys = ("loss/total", "loss/s2t", "loss/ctc", "grad_norm", "lr/lora")
    expected = [[record["step"], *(record[key] for key in keys)] for record in launched.metrics("straight")]
    assert [[record["step"], *(record[key] for key in keys)] for record in launched.metrics("halves")] == expected
    assert launched.events("halves", "resuming")[0]["step"] == 5
    # Dropout was on: without it the straight run would have other weights.
    assert not torch.equal(straight["adapter.weight"], launched.weights("two")["adapter.weight"])


def test_a_damaged_newest_checkpoint_falls_back(launched: Launched) -> None:
    rejected = launched.events("damaged", "checkpoint_rejected")
    assert len(rejected) == 1
    assert rejected[0]["path"].endswith("step-00000010")
    assert "trainable.safetensors does not match its hash" in rejected[0]["why"]
    assert launched.events("damaged", "resuming")[0]["step"] == 5
    # The steps done again are the same steps, and the damaged folder was replaced by a good one.
    straight = launched.weights("straight")
    assert all(torch.equal(launched.weights("damaged")[name], tensor) for name, tensor in straight.items())


@pytest.mark.parametrize(("run", "worlds"), [("fewer", (2, 1)), ("more", (1, 2))])
def test_a_run_goes_on_with_another_number_of_workers(launched: Launched, run: str, worlds: tuple[int, int]) -> None:
    weights, losses = oracle(launched.folder, ToyOptions())
    (resuming,) = launched.events(run, "resuming")
    assert (resuming["saved_world_size"], resuming["world_size"], resuming["step"]) == (*worlds, 5)
    for name, expected in weights.items():
        torch.testing.assert_close(launched.weights(run)[name], expected, rtol=1e-5, atol=2e-6)
    assert launched.weights(run)["classes"].tolist() == [7, 1, 4]
    assert [record["loss/total"] for record in launched.metrics(run)] == pytest.approx(losses, rel=1e-5)


def test_a_finished_run_does_nothing(launched: Launched) -> None:
    assert launched.second["two"]["already_done"]
    assert len(launched.events("two", "start")) == 1


def test_other_data_is_refused_unless_accepted(launched: Launched) -> None:
    assert "the data are other and were toy" in launched.second["refused"]["text"]
    assert launched.second["grown"]["step"] == 4
    (accepted,) = launched.events("grown", "new_data")
    assert (accepted["step"], accepted["what"]) == (3, "the data are other and were toy")


def test_a_changed_recipe_is_refused_unless_named(launched: Launched) -> None:
    assert launched.second["longer"]["error"] == "CheckpointError"
    assert "optim.steps is 4 and was 3" in launched.second["longer"]["text"]
    assert "--allow steps" in launched.second["longer"]["text"]
    changed = {event["key"]: (event["was"], event["now"]) for event in launched.events("grown", "recipe_changed")}
    assert changed["optim.steps"] == (3, 4)
    assert changed["optim.lr.lora"] == (0.02, 0.03)


def test_prefetch_trace_is_stable_from_step_three(launched: Launched) -> None:
    for run in ("two", "two-gas", "two-gas-counted-late", "two-shard"):
        counts = [record["perf/zero_trace_invalidations"] for record in launched.metrics(run)]
        assert counts[2] == counts[-1], (run, counts)


@pytest.mark.parametrize("run", ["two", "two-shard"])
def test_frozen_weights_are_in_no_checkpoint_file(launched: Launched, run: str) -> None:
    torch.manual_seed(17)
    tower = ToyStage(ToyOptions()).tower[2].weight.detach()
    trained = launched.weights(run)["adapter.weight"]
    contents = b"".join(path.read_bytes() for path in launched.checkpoint(run, 10).rglob("*") if path.is_file())
    for row in tower:
        assert row.numpy().tobytes()[:16] not in contents
    assert trained[0].numpy().tobytes() in contents


@pytest.mark.parametrize("run", ["two", "two-shard"])
def test_weights_carry_the_persistent_buffers(launched: Launched, run: str) -> None:
    assert launched.weights(run)["classes"].tolist() == [7, 1, 4]


def test_what_moved_is_checked(launched: Launched) -> None:
    assert launched.first["two"]["unmoved"] == launched.first["two"]["moved_frozen"] == []
    assert launched.first["two-shard"]["moved_frozen"] == []
    wrong = launched.first["wrong"]
    assert wrong["unmoved"] == ["dead.weight"]
    assert wrong["moved_frozen"] == ["tower.0.bias"]
    assert wrong["metrics"]["check/unmoved_trainable"] == wrong["metrics"]["check/moved_frozen"] == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(launched: Launched) -> None:
    outcome = launched.first["nan"]
    assert outcome["error"] == "TrainingError"
    assert "loss/total is not a finite number at step 3" in outcome["text"]
    assert find_weights(launched.folder / "runs" / "nan").parent.name == "step-00000002"
    assert json.loads((launched.folder / "runs" / "nan" / "progress.json").read_text())["state"] == "failed"


def test_metrics_and_progress_files(launched: Launched) -> None:
    records = launched.metrics("two")
    assert [record["step"] for record in records] == list(range(1, 11))
    losses = {"loss/s2t", "loss/ctc", "lr/adapters", "lr/lora", "grad_norm", "stage/answer"}
    speed = {"step_ms", "samples_per_s", "tokens_per_s_per_gpu", "data_wait_share", "peak_gib"}
    assert losses | {f"perf/{name}" for name in speed} <= records[0].keys()
    assert records[0]["stage/answer"] == 42
    assert [record["data/samples"] for record in records] == [8 * step for step in range(1, 11)]
    assert {record["data/indices"] for record in records} == {sum(range(8))}
    assert launched.first["two"]["metrics"]["valid/loss/s2t"] == pytest.approx(
        launched.alone["one"]["metrics"]["valid/loss/s2t"], rel=1e-5
    )
    valid = launched.first["two"]["metrics"]
    assert valid["valid/loss/total"] == pytest.approx(valid["valid/loss/s2t"] + 0.3 * valid["valid/loss/ctc"], rel=1e-5)
    progress = json.loads((launched.folder / "runs" / "straight" / "progress.json").read_text())
    assert (progress["stage"], progress["step"], progress["steps"], progress["state"]) == ("s2t", 10, 10, "finished")
    assert launched.events("two", "start", rank=1)


def test_manifest_names_what_the_run_stood_on(launched: Launched) -> None:
    manifest = json.loads((launched.checkpoint("two", 10) / "manifest.json").read_text())
    assert (manifest["cursor"]["step"], manifest["cursor"]["stream"]) == (
        10,
        {"data": "toy", "seen": 80.0, "committed": 10, "passed_over": 0},
    )
    assert manifest["frozen"]["tower"]["files"].keys() == {"model.safetensors"}
    assert manifest["world_size"] == 2
    assert manifest["recipe"]["optim"]["steps"] == 10
    assert {"torch", "deepspeed"} <= manifest["versions"].keys()
    on_disk = {
        p.relative_to(launched.checkpoint("two", 10)).as_posix() for p in launched.checkpoint("two", 10).rglob("*")
    }
    assert (
        {"trainable.safetensors", "rng/rank-00000.json", "rng/rank-00001.json"} <= manifest["files"].keys() <= on_disk
    )


def test_nothing_unfinished_stays_behind(launched: Launched) -> None:
    for run in ("two", "halves", "damaged", "nan"):
        assert not [path for path in (launched.folder / "runs" / run / "checkpoints").iterdir() if path.name[0] == "."]
