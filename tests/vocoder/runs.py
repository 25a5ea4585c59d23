"""Runs of toy vocoders in processes of their own, and what they leave."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
from launching import launch, start
from safetensors.torch import load_file

from echox.engine.checkpoint.manifest import WEIGHTS, list_checkpoints
from tests.vocoder import toy

WORKER = Path(__file__).with_name("voice_worker.py")


def run_in(folder: Path, voice: Path, processes: int, name: str, **changes: Any) -> Path:
    """Train in processes of their own; the run's folder."""
    die_at = changes.pop("die_at", None)
    scenario = {"name": name, "recipe": toy.recipe_tree(voice, folder / "runs", name, **changes), "die_at": die_at}
    if die_at is None:
        launch(folder, WORKER, processes, [scenario])
    else:
        ranks = start(folder, WORKER, processes, [scenario])
        assert ranks.wait() == [-signal.SIGKILL] * processes, ranks.said()
    return folder / "runs" / name


def trained_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[0] / WEIGHTS)


def losses_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], {k: v for k, v in row.items() if k.startswith(("loss/", "lr/"))}) for row in rows]
