"""Stage II under ZeRO-3 on uneven, partly damaged shards: processes finish their epochs, and every sample counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch, prepare
from safetensors.torch import load_file

from echox.engine.checkpoint.checkpointer import find_weights
from echox.stream.format.catalogue import Catalogue
from echox.stream.format.writer import write_shards

WORKER = Path(__file__).with_name("stream_worker.py")
SAMPLES, DAMAGED, STEP, STEPS = 21, "s007", 6, 8
WINDOWED = {"global_batch": STEP, "micro_batch": 3, "window_shards": 3}


def sample(number: int) -> dict[str, Any]:
    units = np.arange(2 + number % 5 * 3, dtype="<u2").tobytes()
    meta = {"id": f"s{number:03d}", "answer_text": "ab" * (1 + number % 3), "task": "tts", "answer_s": 0.1 * len(units)}
    return {"__key__": f"s{number:03d}", "answer.units": units, "json": meta}


def recipe(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "stage": "t2c",
        "model__t2c": {"prefix": "p", "unit_header": "h", "unit_language": "u"},
        "data__train": [{"path": str(data / "train"), "task": "tts"}],
        "data__valid": [{"path": str(data / "valid"), "task": "tts"}],
        **{f"data__{name}": value for name, value in WINDOWED.items()},
        "data__quarantine": {"share": 0.2},
        "optim__steps": STEPS,
        "engine__validate_every": 0,
        "engine__checkpoint_every": 4,
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one, two and five samples, one sample damaged."""
    folder = prepare(tmp_path_factory.mktemp("stream"))
    write_shards(folder / "train", map(sample, range(SAMPLES)), per_shard=5)
    write_shards(folder / "valid", map(sample, range(100, 103)), per_shard=1)
    catalogue = Catalogue.open(folder / "train")
    number = next(n for n in range(SAMPLES) if catalogue.key(n) == DAMAGED)
    offset, _ = catalogue.members(number)["answer.units"]
    shard = folder / "train" / catalogue.shard_names[int(catalogue.records["shard"][number])]
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    whole, tight = recipe(folder), recipe(folder, data__quarantine={"samples": 0})
    budget = {"by": "tokens", "size": 20, "micro_batches": 2}
    first = [
        {"name": "whole", "recipe": whole},
        {"name": "halves", "recipe": whole, "die_at": 4},
        {"name": "tight", "recipe": tight},
        {"name": "budget", "recipe": recipe(folder, data__budget=budget)},
    ]
    found = launch(folder, WORKER, 2, first)
    # The same run again, its step in other portions and with another number of threads.
    split = recipe(folder, data__micro_batch=1, data__reader_threads=1, data__prefetch=1)
    found |= launch(folder, WORKER, 2, [{"name": "halves", "recipe": split}])
    return found | launch(folder, WORKER, 1, [{"name": "alone", "recipe": whole}])


def records(folder: Path, run: str) -> list[dict[str, float]]:
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/total" in record]


def test_two_ranks_finish_epochs_of_uneven_shards_and_count_every_sample_once(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    metrics = outcomes["whole"]["metrics"]
    assert outcomes["whole"]["step"] == STEPS
    trained, dropped = metrics["data/samples"] - metrics["data/quarantined"], metrics["data/quarantined"]
    assert 1 < metrics["data/epoch"] == pytest.approx(metrics["data/samples"] / SAMPLES)
    assert dropped in (1, 2) and trained > SAMPLES
    seen = [record["data/samples"] for record in records(folder, "whole")]
    assert seen == sorted(seen) and set(np.diff([0, *seen])) <= set(range(3, STEP + 1))


def test_the_damaged_sample_is_in_the_ledger_once_a_visit(folder: Path, outcomes: dict[str, Any]) -> None:
    for run in ("whole", "halves"):
        lines = (folder / "runs" / run / "quarantine" / "ledger.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert {entry["sample"] for entry in entries} == {DAMAGED}
        assert {entry["kind"] for entry in entries} == {"checksum"}
        assert len(entries) == outcomes[run]["metrics"]["data/quarantined"]


@pytest.mark.parametrize("other", ["halves", "alone"])
def test_killed_and_resumed_in_other_portions_or_in_one_process_it_trains_the_same(
    folder: Path, outcomes: dict[str, Any], other: str
) -> None:
    assert outcomes[other]["step"] == STEPS
    expected, found = outcomes["whole"]["metrics"], outcomes[other]["metrics"]
    same = [name for name in expected if name.startswith("data/") and "padding" not in name]
    assert len(same) > 5 and {name: found[name] for name in same} == {name: expected[name] for name in same}
    # Three samples held out: in two processes, one has a batch more than the other and fills it up.
    assert found["valid/loss/t2c"] == pytest.approx(expected["valid/loss/t2c"], rel=1e-4)
    weights = load_file(find_weights(folder / "runs" / "whole"))
    for name, tensor in load_file(find_weights(folder / "runs" / other)).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def test_more_damage_than_allowed_stops_the_run_in_a_sentence(outcomes: dict[str, Any]) -> None:
    assert outcomes["tight"]["error"] == "DataError"
    assert "1 of 10 samples were damaged and dropped, more than data.quarantine.samples=0" in outcomes["tight"]["text"]


def test_a_budget_of_tokens_gives_every_rank_the_same_number_of_forwards(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    assert outcomes["budget"]["step"] == STEPS
    found = records(folder, "budget")
    assert len({record["data/samples"] for record in found}) == STEPS
    assert found[-1]["data/samples"] > STEPS
