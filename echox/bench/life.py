"""Measures the overhead of saving checkpoints, blocking or in the background, and of the checks of every step.

The real train function runs a recipe's stage at its true shapes on random weights and one synthetic batch, in this
process; the runs that are compared take turns, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from echox.bench.step import synthetic_batch, without_alignment
from echox.bench.table import Row
from echox.engine.context import LocalContext
from echox.engine.interfaces import StageSetup
from echox.engine.loss_guard import LossGuard
from echox.engine.rank_status import RankStatus, Vote
from echox.engine.trainer import train

if TYPE_CHECKING:
    from echox.bench.micro_batch import Load
    from echox.config.schema import Recipe


@dataclass(frozen=True)
class OneBatch:
    """A loader that gives the same micro-batch at every step."""

    batch: Any

    def identity(self) -> Mapping[str, Any]:
        """Nothing to compare."""
        return {}

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        """No position to restore."""
        return []

    def step(self, step: int) -> Sequence[Any]:
        """The batch."""
        return [self.batch]

    def commit(self) -> None:
        """Nothing to note."""

    def check_accounts(self, account: Sequence[float]) -> Mapping[str, float]:
        """Nothing to account for."""
        return {}

    def record(self) -> Mapping[str, Any]:
        """No position to record."""
        return {}

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        """No position to return to."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Timed:
    """One run: mean milliseconds a step, and of those what saving blocked."""

    step_ms: float
    blocked_ms: float
    save_s: float


def measure_life(recipe: Recipe, load: Load, *, steps: int, every: int, repeats: int) -> list[Row]:
    """Time a stage with and without checks, and with saves every so many steps.

    Args:
        recipe: its weights and data are not read.
        load: the synthetic micro-batch.
        steps: optimizer steps of each run.
        every: steps between saves.
        repeats: times that every run is repeated.
    """
    plain = {"checkpoint_every": 0}
    kinds: dict[str, tuple[dict[str, Any], bool]] = {
        "unchecked": (plain, False),
        "checked": (plain, True),
        "behind": ({"checkpoint_every": every, "async_save": True}, True),
        "in front": ({"checkpoint_every": every, "async_save": False}, True),
    }
    found: dict[str, list[Timed]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="echox-bench-") as folder, LocalContext(folder) as context:
        for repeat in range(repeats):
            for kind, (engine, checked) in kinds.items():
                name = f"{kind.replace(' ', '-')}-{repeat}"
                with contextlib.nullcontext() if checked else _unchecked(), contextlib.redirect_stderr(io.StringIO()):
                    found[kind].append(_run(context, recipe.model_copy(update={"name": name}), load, steps, engine))
    middle = {kind: statistics.median(run.step_ms for run in runs) for kind, runs in found.items()}

    def ratio(kind: str, against: str) -> float:
        pairs = zip(found[kind], found[against], strict=True)
        return statistics.median(one.step_ms / other.step_ms for one, other in pairs)

    def of(kind: str, field: str) -> float:
        return float(statistics.median(getattr(run, field) for run in found[kind]))

    return [
        Row("step, no checks", middle["unchecked"], "ms"),
        Row("step, all checks", middle["checked"], "ms", ratio("checked", "unchecked"), "no checks", "≤ 1.01"),
        Row(f"step, saved behind every {every}", middle["behind"], "ms", ratio("behind", "checked"), "no saves"),
        Row(f"step, saved in front every {every}", middle["in front"], "ms", ratio("in front", "checked"), "no saves"),
        Row("training blocked a save, behind", of("behind", "blocked_ms"), "ms"),
        Row("training blocked a save, in front", of("in front", "blocked_ms"), "ms"),
        Row("save until it is published, behind", 1000 * of("behind", "save_s"), "ms"),
    ]


def _run(context: LocalContext, recipe: Recipe, load: Load, steps: int, engine: Mapping[str, Any]) -> Timed:
    changed = without_alignment(recipe).model_copy(
        update={
            "engine": recipe.engine.model_copy(update={**engine, "validate_every": 0, "log_every": 1, "keep": 1}),
            "optim": recipe.optim.model_copy(update={"steps": steps, "warmup_steps": 1, "hold_steps": 0}),
            "data": recipe.data.model_copy(update={"global_batch": load.rows, "micro_batch": load.rows}),
        }
    )

    def build(recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        torch.manual_seed(0)
        module, batch = synthetic_batch(recipe, load)
        return StageSetup(module=module, train_loader=OneBatch(batch))

    train(changed, context, build)
    log = context.storage / recipe.name / "log" / "rank-00000.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] == "step"]
    saved = [event for event in events if event["event"] == "saved"][:-1]  # the last one has no step to hide behind
    return Timed(
        step_ms=1000 * (times[-1] - times[1]) / (len(times) - 2),
        blocked_ms=statistics.mean(event["perf/save_blocked_ms"] for event in saved) if saved else 0.0,
        save_s=statistics.mean(event["perf/save_s"] for event in saved) if saved else 0.0,
    )


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Steps without verdict and vote."""
    with (
        mock.patch.object(LossGuard, "nan_if_bad", lambda self, total: torch.ones_like(total)),
        mock.patch.object(LossGuard, "record", lambda self, total, *, skipped: None),
        mock.patch.object(RankStatus, "exchange", lambda self, vote: Vote()),
    ):
        yield
