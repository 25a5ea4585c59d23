"""Stand-ins for the engine and the stages, so that the launch path is tested without a model. Run in Ray workers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from echox.engine.interfaces import TrainResult
from echox.engine.monitor.event_log import EventLog
from echox.engine.monitor.run_dir import RunDir
from echox.engine.stop import StopListener
from echox.errors import DataError

STEP_S = 0.05


def setup(recipe: Any, rank: int, world_size: int) -> str:
    return f"{recipe.stage} {rank}/{world_size}"


def tiny_setup(recipe: Any, rank: int, world_size: int) -> Any:
    """A tiny Stage II, for the real engine; `tests/engine` is on the path."""
    from stream_worker import Build

    return Build(Path(os.environ["TOY_FROZEN"]))(recipe, rank, world_size)


def train(recipe: Any, context: Any, build: Any, tracker: Any, **options: Any) -> Any:
    """All-reduce the ranks, write a checkpoint folder and a metric, as the engine would."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    run = context.storage / recipe.name
    checkpoint = run / "checkpoints" / "step-00000001"
    if context.rank == 0:
        checkpoint.mkdir(parents=True, exist_ok=True)
        seen = {
            "setup": build(recipe, context.rank, context.world_size),
            "total": total.item(),
            "world": context.world_size,
            "cwd": str(Path.cwd()),
            "accelerator": os.environ.get("DS_ACCELERATOR"),
            "nccl": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"),
            "cache": os.environ.get("ECHOX_CACHE"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "checkpoint_in": str(context.checkpoint_in),
            "steps": recipe.optim.steps,
            "options": options,
        }
        (run / "seen.json").write_text(json.dumps(seen))
    tracker.log_metrics({"loss/total": total.item()}, 1)
    dist.barrier()
    context.report({"loss/total": total.item()}, checkpoint)
    return _result(run, 1, checkpoint)


def train_watched(recipe: Any, context: Any, build: Any, tracker: Any, **options: Any) -> Any:
    """Report an attempt, a step and a save, and wait until a test has seen them.

    `<run>/nodes.json` is Ray's view, `<run>/network.json` each rank's variables of the network.
    """
    import ray
    import torch.distributed as dist

    run = context.storage / recipe.name
    own = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    network: list[Any] = [None] * context.world_size
    dist.all_gather_object(network, own)
    if context.rank == 0:
        tracker.begin_attempt(3, 40, {})
        tracker.log_metrics({"loss/total": 1.25, "perf/step_ms": 800.0, "health/bad_steps": 2.0}, 41)
        tracker.log_metrics({"perf/save_s": 6.5, "perf/save_blocked_ms": 30.0}, 41)
        RunDir(run).write_progress(stage=recipe.stage, step=41, steps=41, state="training", attempt=3)
        (run / "network.json").write_text(json.dumps(network))
        (run / "nodes.json").write_text(json.dumps(ray.nodes()))
        while not (run / "seen").exists():
            time.sleep(STEP_S)
    dist.barrier()
    return _result(run, 41, None)


def train_bad_data(recipe: Any, context: Any, build: Any, tracker: Any, **options: Any) -> Any:
    if context.rank == 1:
        raise DataError("shard-000000.tar ends in the middle of a sample", where="sqa-train", fix="build it again")
    time.sleep(600)


def train_steps(recipe: Any, context: Any, build: Any, tracker: Any, **options: Any) -> Any:
    """The engine's life in small: attempts, progress, events, checkpoints, validation, and a stop by vote of all ranks.

    Reads like the real loop; a step is an all-reduce. `<run>/pids.json` lets a test find the workers.
    """
    import torch
    import torch.distributed as dist

    run = context.storage / recipe.name
    folder, leads = RunDir(run), context.rank == 0
    box = [folder.next_attempt() if leads else 0]
    dist.broadcast_object_list(box, src=0)
    attempt = box[0]
    log = EventLog(run, rank=context.rank, attempt=attempt)
    listener = StopListener(run if leads else None, context.stop_requested)
    pids: list[Any] = [None] * context.world_size
    dist.all_gather_object(pids, os.getpid())

    def say(state: str, step: int) -> None:
        if leads:
            steps = recipe.optim.steps
            folder.write_progress(
                stage=recipe.stage, step=step, steps=steps, state=state, attempt=attempt, loss=1 / steps
            )

    def stopped() -> bool:
        vote = torch.tensor([float(listener.why is not None)])
        dist.all_reduce(vote)
        return vote.item() > 0

    def save(step: int) -> Path:
        say("saving", step)
        path = run / "checkpoints" / f"step-{step:08d}"
        if leads:
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").write_text(json.dumps({"step": step, "world": context.world_size}))
        dist.barrier()
        log("checkpoint", step=step, path=path)
        context.report({"loss/total": 1.0}, path)
        return path

    say("starting", 0)
    steps = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    first = int(json.loads(steps[-1].read_text())["step"]) if steps else 0
    log("start", step=first, world_size=context.world_size)
    if leads:
        (run / "pids.json").write_text(json.dumps({"attempt": attempt, "pids": pids, "first": first}))
    step, why = first, ""
    checkpoint = None
    try:
        for step in range(first + 1, recipe.optim.steps + 1):
            time.sleep(STEP_S)
            stop = stopped()
            say("training", step)
            if leads:
                log("step", step=step)
            if not stop and recipe.engine.validate_every and step % recipe.engine.validate_every == 0:
                for _ in range(600):
                    say("validating", step)
                    time.sleep(STEP_S)
                    if stopped():
                        stop = True
                        break
            if stop or step == recipe.optim.steps or step % (recipe.engine.checkpoint_every or 10**9) == 0:
                checkpoint = save(step)
            if stop:
                reasons: list[Any] = [None] * context.world_size
                dist.all_gather_object(reasons, listener.why)
                why = next(reason for reason in reasons if reason)
                break
        say("stopped" if why else "finished", step)
    except BaseException as error:
        log("failed", step=step, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        listener.close()
    return _result(run, step, checkpoint, why)


def _result(run: Path, step: int, checkpoint: Path | None, why: str = "") -> Any:
    result = TrainResult(run_folder=run, step=step, checkpoint=checkpoint, metrics={})
    object.__setattr__(result, "stopped", why)
    return result
