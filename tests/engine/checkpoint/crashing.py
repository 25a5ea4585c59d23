"""Saves a second checkpoint again and again, each time killed one file operation later; run by `test_crash_points`.

`python crashing.py FOLDER`, with `crash_at.so` preloaded. Prints a JSON line: what was found after each kill.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from echox.engine import rng_state
from echox.engine.checkpoint.manifest import (
    Choice,
    checkpoints_folder,
    choose,
    list_checkpoints,
    step_name,
    sweep,
    verify,
)
from echox.engine.checkpoint.retention import Retention
from echox.engine.checkpoint.sharded_state import SavedSlices
from echox.engine.checkpoint.writer import Consolidation, RankPart, publish_whole, write_part
from echox.errors import CheckpointError

RANKS, ELEMENTS = 2, 5000


def save(run: Path, step: int) -> None:
    """What the ranks of a run do for one checkpoint, one after the other, with the old one deleted at the end."""
    temporary = checkpoints_folder(run) / f".attempt-1.{step}-{step_name(step)}"
    files: dict[str, Any] = {}
    for rank in range(RANKS):
        part = torch.full((ELEMENTS,), float(step))
        slices = {f"{kind}/weight": part.clone() for kind in ("fp32", "exp_avg", "exp_avg_sq")}
        files |= write_part(temporary, RankPart(rank=rank, slices=slices, random=rng_state.capture()))
    whole = Consolidation(
        contents={"step": step, "metrics": {}, "world_size": RANKS},
        ranks=RANKS,
        trainable={"weight": ((RANKS * ELEMENTS,), torch.float32)},
        buffers={},
        allowed=lambda: None,
    )
    publish_whole(temporary, checkpoints_folder(run) / step_name(step), whole, files)
    Retention(last=1).apply(run)


def found(run: Path) -> int:
    """Step of the checkpoint that a resume would take, after looking that every part of it is of that step."""
    choice: Choice = choose(list_checkpoints(run))
    if choice.checkpoint is None:
        raise CheckpointError("no checkpoint is left")
    step = int(choice.checkpoint.manifest["step"])
    with SavedSlices(choice.checkpoint.path, RANKS) as saved:
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            values = saved.read(f"{kind}/weight", 0, RANKS * ELEMENTS)
            assert torch.equal(values, torch.full_like(values, float(step))), f"a mixture under step {step}"
    for published in list_checkpoints(run):
        verify(published)
    return step


def killed_at(run: Path, operation: int, torn: bool) -> bool:
    """Save step 2 in a copy of this process that dies at a file operation; whether it did."""
    child = os.fork()
    if not child:
        ctypes.CDLL(None).arm(ctypes.c_long(operation), int(torn))
        save(run, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def main() -> None:
    folder = Path(sys.argv[1])
    save(folder / "first", 1)
    steps: list[Any] = []
    for torn in (False, True):
        for operation in range(1, 10_000):
            run = folder / f"run-{operation}-{torn}"
            shutil.copytree(folder / "first", run)
            dead = killed_at(run, operation, torn)
            try:
                step: Any = found(run)
                sweep(run)
                left = sorted(path.name for path in checkpoints_folder(run).iterdir())
                if any(name.startswith(".") for name in left):
                    step = f"left behind: {left}"
            except (CheckpointError, AssertionError) as error:
                step = str(error)
            steps.append(step)
            shutil.rmtree(run)
            if not dead:
                break
    print(json.dumps(steps))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
