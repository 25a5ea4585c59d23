"""Defines the interfaces of the parts that the engine is given: a stage, its batches, its loaders and a tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from echox.config.schema import Recipe
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.run_files import RunFile
    from echox.engine.world import World


class BatchLike(Protocol):
    """One micro-batch of one rank: a dataclass of tensors.

    A batch may also have `stats() -> dict[str, float]` with host numbers that are added up over the step:
    `tokens` (positions that hold data), `positions` (with padding), `audio_s` (seconds of audio).
    They feed `perf/tokens_per_s_per_gpu`, `perf/audio_s_per_s` and, where the stage's metrics do not tell what it
    computed on, `perf/padding_share`.
    """

    ids: list[str]

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on `device`."""
        ...


class LossTermLike(Protocol):
    """One named loss of one rank: the sum over its tokens and their number, both scalar tensors."""

    @property
    def total(self) -> Tensor:
        """Sum of the token losses, fp32, with a graph while training."""
        ...

    @property
    def count(self) -> Tensor:
        """Number of tokens behind `total`; 0 is allowed and contributes nothing."""
        ...


class Stage(Protocol):
    """What one training stage computes; an `nn.Module` with these methods.

    It may also have `zero_leaf_modules() -> list[nn.Module]`: modules whose parameters ZeRO-3 gathers at once,
    `metrics() -> dict[str, Tensor]`: small detached tensors of the last forward, and `needs_survey(batch) -> bool`:
    whether token counts or weights of its losses depend on forwards of the whole window. Where it does, and a step has
    several micro-batches, each gets a forward without gradient before the first backward (`Engine.evaluating`).

    A stage that notes what a forward computed on as `work`, without a kernel, and has `flops(works)`, the FLOP by part
    of so many forwards and their backward, gets `perf/tflops_per_s_per_gpu`, and on GPUs whose limits are known
    `perf/mfu`. Of `part_seconds() -> dict[str, float]`, seconds in named parts since it was last asked, come
    `perf/<part>_share` of the time.

    What trains becomes views of a few flat parameters (`echox/engine/flat.py`) that are made before each forward of the
    stage: a forward reads a module's `weight` where it needs it, and keeps none. A module that multiplies with several
    weights at once says so in `stacked_weights()` (`echox/models/lora.py`) and gets one view over all of them.

    A stage with `probe(batch) -> dict[str, LossTerm]` is asked for it where metrics are read, on all ranks, as
    `stage(None, probe)`: it hands on to a function given beside a batch, so that ZeRO-3 gathers what that needs.
    """

    def __call__(self, batch: Any) -> Mapping[str, LossTermLike]:
        """Run the forward and return every loss of the stage, the same names on all ranks and steps."""
        ...

    def loss_weights(self, means: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor | float]:
        """Weight of each loss at `step` (from 0), given the detached global token means; NaN for one without tokens."""
        ...

    def known_counts(self, batch: Any) -> Mapping[str, int]:
        """Token counts of the losses whose count needs no forward; the engine sums them over the whole window."""
        ...

    def parameter_groups(self) -> Mapping[str, list[str]]:
        """Learning-rate group (a field of `LrConfig`) to the names of its parameters; covers every trainable."""
        ...


class TrainLoader(Protocol):
    """The rank's training data, step after step, read ahead in the background.

    A batch may have an `account`: a vector of numbers (float64, of the same length in all batches of all ranks) that
    the engine adds up beside the losses and hands to `check_accounts`.
    """

    def identity(self) -> Mapping[str, Any]:
        """What identifies the data and their order, the same on all ranks; JSON types."""
        ...

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        """Begin at optimizer step `step` (from 0), where the saved record stands.

        Returns:
            What is not as it was and was accepted, a clause each.

        Raises:
            CheckpointError: the data are not those of the record; the same on all ranks.
        """
        ...

    def step(self, step: int) -> Sequence[BatchLike]:
        """The micro-batches of optimizer step `step`, as many as gradient accumulation takes; each step once."""
        ...

    def commit(self) -> None:
        """Note that the step delivered last was trained."""
        ...

    def check_accounts(self, account: Sequence[float]) -> Mapping[str, float]:
        """Metrics of the data trained since the last call, from the sum of their accounts over ranks and steps.

        Raises:
            DataError: the data are not what they should be; the same on all ranks.
        """
        ...

    def record(self) -> Mapping[str, Any]:
        """Where the data stand after the committed and checked steps, for the checkpoint; JSON types."""
        ...

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        """Go back to a saved record, and on behind the next `pass_over` steps, whose samples are not trained.

        The next step asked for is optimizer step `step`.
        """
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


class Refresh(Protocol):
    """What a run makes again between two steps with its present weights, on all ranks alike, such as answers."""

    def resume(self, run_folder: Path, step: int, world: World) -> None:
        """Bring what was made to where it stood after `step` optimizer steps; every rank calls it."""
        ...

    def due(self) -> bool:
        """Whether it is to be made before the next step; the same on all ranks."""
        ...

    def run(
        self, engine: Engine, world: World, step: int, keep_going: Callable[[], bool]
    ) -> Mapping[str, float] | None:
        """Make it after `step` optimizer steps; metrics, or None where `keep_going`, asked now and then, said no."""
        ...


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """Everything a run trains with, built for one rank.

    Attributes:
        module: the stage (`Stage`), on the CPU, in fp32 or the run's dtype.
        train_loader: the rank's `TrainLoader`.
        valid_loaders: name to batches of this rank, in the same number on every rank; padding carries zero weight.
        frozen_models: name to folder of every pretrained model whose weights are frozen.
        files: name in the run's folder to a file that the weights mean nothing without; it is copied there.
        refresh: what is made again between steps; None for nothing.
        notes: event to one line about the setup that the run's log is to have.
        compiled: kind of part to how many of the module's run compiled; empty where the recipe does not ask for it.
    """

    module: torch.nn.Module
    train_loader: TrainLoader
    valid_loaders: Mapping[str, Iterable[BatchLike]] = field(default_factory=dict)
    frozen_models: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, RunFile] = field(default_factory=dict)
    refresh: Refresh | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    compiled: Mapping[str, int] = field(default_factory=dict)


class BuildSetup(Protocol):
    """Builds the setup of one rank; the command line injects `echox.builders.setup.build_setup`."""

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        """Build stage, loaders and the list of frozen models."""
        ...


class Tracker(Protocol):
    """Where metrics of a run go; only rank 0 is given a real one. No method may block or fail training."""

    @property
    def in_one_file(self) -> bool:
        """Whether all runs are recorded in one file of the storage, which several nodes must not write to."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the flattened parameters of the run."""
        ...

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach one file to the run."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        ...

    def begin_attempt(self, attempt: int, step: int, tags: Mapping[str, str]) -> None:
        """An attempt at the run begins, at so many optimizer steps done; earlier ones have ended."""
        ...

    def end_attempt(self, status: str, tags: Mapping[str, str]) -> None:
        """The attempt ends as FINISHED, FAILED or KILLED; the run may go on in another one."""
        ...

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        ...


class NullTracker:
    """A tracker that records nothing."""

    in_one_file = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Record nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record nothing."""

    def begin_attempt(self, attempt: int, step: int, tags: Mapping[str, str]) -> None:
        """Record nothing."""

    def end_attempt(self, status: str, tags: Mapping[str, str]) -> None:
        """Record nothing."""

    def finish(self, status: str) -> None:
        """Record nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run_folder: folder of the run.
        step: optimizer steps done in all attempts.
        checkpoint: newest checkpoint folder, or None when nothing was saved.
        metrics: the last training and validation metrics.
        unmoved_trainable: trainable tensors that this attempt left as they were.
        moved_frozen: frozen tensors that changed.
        already_done: the run had finished before; nothing was trained.
        stopped: why the run was stopped before its last step; empty when it was not.
    """

    run_folder: Path
    step: int
    checkpoint: Path | None
    metrics: Mapping[str, float]
    unmoved_trainable: tuple[str, ...] = ()
    moved_frozen: tuple[str, ...] = ()
    already_done: bool = False
    stopped: str = ""
