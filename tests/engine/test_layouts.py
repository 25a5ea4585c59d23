"""Two gloo processes under ZeRO-3: Stage III trains the same on packed and padded rows, weights whole or divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare
from safetensors.torch import load_file

from echox.engine.checkpoint.checkpointer import find_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKER = Path(__file__).with_name("layout_worker.py")
RUNS = {
    "packed-replicate": {"layout": "packed", "placement": "replicate"},
    "padded-replicate": {"layout": "padded", "placement": "replicate"},
    # A chunk of two positions or classes: as many for each rank as its own rows make.
    "packed-shard": {"layout": "packed", "placement": "shard", "chunk": 96},
    "checkpointed": {"layout": "packed", "placement": "replicate", "checkpointing": True},
    "compiled": {"layout": "packed", "placement": "shard", "checkpointing": True, "compiled": True},
    **{split: {"layout": "packed", "placement": "shard", "split": split} for split in ("whole", "2-and-2", "1-and-3")},
    **{
        f"generated-{split}": {"layout": layout, "placement": place, "split": split, "pseudo_text": "generated"}
        for layout, place, split in (("packed", "shard", "whole"), ("padded", "replicate", "1-and-3"))
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = prepare(tmp_path_factory.mktemp("layouts"))
    usual = {"checkpointing": False, "split": "", "pseudo_text": "argmax_teacher_forced", "chunk": 1 << 25}
    usual["compiled"] = False
    scenarios = [{"name": name, **usual, **run} for name, run in RUNS.items()]
    return folder / "runs", launch(folder, WORKER, 2, scenarios)


def _steps(runs: Path, name: str) -> list[dict[str, float]]:
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/total" in record]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("packed-replicate", other) for other in ("padded-replicate", "packed-shard", "checkpointed", "compiled")),
        *(("whole", split) for split in ("2-and-2", "1-and-3")),
        ("generated-whole", "generated-1-and-3"),
    ],
)
def test_losses_gradients_and_weights_are_the_same(trained: tuple[Path, dict[str, Any]], one: str, other: str) -> None:
    runs, _ = trained
    packed, reference = _steps(runs, one), _steps(runs, other)
    assert len(packed) == len(reference) > 2
    for ours, theirs in zip(packed, reference, strict=True):
        for key in ("loss/total", "loss/s2t", "loss/echo", "loss/denoising", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    weights, expected = (load_file(find_weights(runs / name)) for name in (one, other))
    assert weights.keys() == expected.keys() and len(weights) > 20
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_the_run_moves_what_trains_and_keeps_its_prefetch_trace(trained: tuple[Path, dict[str, Any]]) -> None:
    runs, outcomes = trained
    for name, outcome in outcomes.items():
        assert outcome == {"moved_frozen": [], "unmoved": []}, name
        counts = [record["perf/zero_trace_invalidations"] for record in _steps(runs, name)]
        assert counts[-1] == counts[2], name
        nats = [record["pseudo_text/nats_per_token"] for record in _steps(runs, name)]
        assert len(nats) > 2 and all(2 < value < 20 for value in nats), name
    rejected = {record["pseudo_text/rejected_share"] for record in _steps(runs, "generated-whole")}
    assert rejected == {1 / 4}
    assert {record["perf/padding_share"] for record in _steps(runs, "packed-shard")} == {0}
    assert all(record["perf/padding_share"] > 0.1 for record in _steps(runs, "padded-replicate"))
