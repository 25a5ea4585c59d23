"""Two gloo processes under ZeRO-3: Stage III on packed rows trains exactly as on padded ones."""

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

from echox.engine.checkpoint import find_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RUNS = [("packed", "replicate"), ("padded", "replicate"), ("packed", "shard")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "frozen").mkdir()
    (folder / "frozen" / "model.safetensors").write_bytes(b"frozen weights")
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    paths = {"deepspeed": "ds.json", "frozen": "frozen", "storage": "runs", "out": "out.json"}
    plan = {key: str(folder / name) for key, name in paths.items()}
    (folder / "plan.json").write_text(json.dumps({**plan, "runs": RUNS}))
    here = Path(__file__).parent
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(here / "layout_worker.py")]
    ran = subprocess.run(
        [sys.executable, *command, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={
            **os.environ,
            "ECHOX_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(here.parents[1]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    return folder / "runs", json.loads((folder / "out.json").read_text())


def _steps(runs: Path, name: str) -> list[dict[str, float]]:
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/total" in record]


@pytest.mark.parametrize("other", ["padded-replicate", "packed-shard"])
def test_losses_gradients_and_weights_are_the_same(trained: tuple[Path, dict[str, Any]], other: str) -> None:
    runs, _ = trained
    packed, reference = _steps(runs, "packed-replicate"), _steps(runs, other)
    assert len(packed) == len(reference) > 2
    for ours, theirs in zip(packed, reference, strict=True):
        for key in ("loss/total", "loss/s2t", "loss/echo", "loss/denoising", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    weights, expected = (load_file(find_weights(runs / name)) for name in ("packed-replicate", other))
    assert weights.keys() == expected.keys() and len(weights) > 20
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_the_run_moves_what_trains_and_keeps_its_prefetch_trace(trained: tuple[Path, dict[str, Any]]) -> None:
    runs, outcomes = trained
    for name, outcome in outcomes.items():
        assert outcome == {"moved_frozen": [], "unmoved": []}, name
        counts = [record["perf/zero_trace_invalidations"] for record in _steps(runs, name)]
        assert counts[-1] == counts[2], name
    assert {record["perf/padding_share"] for record in _steps(runs, "packed-shard")} == {0}
    assert all(record["perf/padding_share"] > 0.1 for record in _steps(runs, "padded-replicate"))
