"""Starts worker scripts of the engine tests in one process or several, and runs a plan's scenarios in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from echox.engine.context import LocalContext, TorchrunContext

Context = LocalContext | TorchrunContext
Scenario = dict[str, Any]


def prepare(folder: Path) -> Path:
    """Put a frozen model and a ZeRO-3 JSON where `launch` expects them."""
    (folder / "frozen").mkdir()
    (folder / "frozen" / "model.safetensors").write_bytes(b"frozen weights")
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


def launch(folder: Path, worker: Path, processes: int, scenarios: list[Scenario]) -> dict[str, Any]:
    """Run scenarios one after the other; returns what rank 0 says of each."""
    paths = {"deepspeed": "ds.json", "frozen": "frozen", "storage": "runs", "out": "out.json"}
    plan = {key: str(folder / name) for key, name in paths.items()}
    (folder / "plan.json").write_text(json.dumps({**plan, "scenarios": scenarios}))
    (folder / "out.json").unlink(missing_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ran = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(worker), str(folder / "plan.json")],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={
            **os.environ,
            "ECHOX_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(worker.parents[2]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    outcomes: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return outcomes


def work(run: Callable[[dict[str, Any], Context, Scenario], Any]) -> None:
    """The main function of a worker script, which `launch` calls with the file of its plan."""
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    kind = TorchrunContext if TorchrunContext.detected() else LocalContext
    outcomes = {}
    with kind(plan["storage"]) as context:
        for scenario in plan["scenarios"]:
            outcomes[scenario.get("label", scenario["name"])] = run(plan, context, scenario)
    if context.rank == 0:
        Path(plan["out"]).write_text(json.dumps(outcomes))
