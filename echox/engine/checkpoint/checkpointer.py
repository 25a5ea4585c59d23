"""Saves and loads the trainable state of a run: a checkpoint is complete under its name, or not there at all.

A save begins with a copy to the host and goes on behind the next steps; the ranks' votes after each step move it along.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from echox.config.paths import is_url
from echox.engine import rng_state
from echox.engine.checkpoint.contents import Cursor, RunContents
from echox.engine.checkpoint.manifest import (
    CREATED,
    MANIFEST,
    WEIGHTS,
    Checkpoint,
    Choice,
    checkpoints_folder,
    choose,
    list_checkpoints,
    step_name,
    weights_name,
)
from echox.engine.checkpoint.recipe_diff import refused_changes
from echox.engine.checkpoint.retention import Retention
from echox.engine.checkpoint.sharded_state import HostState, put_back
from echox.engine.checkpoint.writer import Consolidation, RankPart, Save, Upload, random_file
from echox.engine.object_store.checkpoints import PublishedCheckpoints, StoreUpload
from echox.engine.object_store.reading import local_checkpoint
from echox.engine.rank_status import RankStatus, Vote
from echox.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from echox.config.section import Section
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.monitor.run_dir import RunDir
    from echox.engine.world import World

log = logging.getLogger("echox.engine")

_FAILURES_TOLERATED = 1
"""Saves in a row that may fail while training goes on; the next one ends the run."""
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "webdataset", "numpy")


def find_weights(run_or_checkpoint: str | Path) -> Path:
    """The consolidated trainable weights of a checkpoint folder, or of a run's newest good checkpoint.

    A run may be given by its URL in an object store; the weights are then brought to this machine. An exported folder
    is a checkpoint too.

    Raises:
        CheckpointError: there is no checkpoint, or none whose weights match their hash.
    """
    if is_url(str(run_or_checkpoint)):
        chosen = local_checkpoint(str(run_or_checkpoint))
    else:
        folder = Path(run_or_checkpoint)
        candidates = [folder] if (folder / MANIFEST).is_file() else list_checkpoints(folder)
        chosen = choose(candidates, only=(weights_name(folder),)).checkpoint
    if chosen is None:
        raise CheckpointError(
            "no checkpoint found", where=str(run_or_checkpoint), fix="train the stage first: echox train RECIPE"
        )
    return chosen.path / weights_name(chosen.path)


def find_checkpoint(run_folder: Path, asked: Path | None = None) -> Choice:
    """The newest verified checkpoint of a run; the one the launcher `asked` for counts when it lies elsewhere."""
    candidates = list_checkpoints(run_folder)
    if asked is not None and asked.resolve() not in {path.resolve() for path in candidates}:
        candidates.append(asked)
    return choose(candidates)


def check_fits(choice: Choice, recipe: Section, allow: Sequence[str] = ()) -> None:
    """Raise CheckpointError when the run would not go on as this recipe says; `allow` names keys that may differ."""
    if choice.checkpoint is None:
        return
    changed = refused_changes(choice.checkpoint.manifest["recipe"], recipe.model_dump(mode="json"), allow, type(recipe))
    if changed:
        words = sorted({key.rpartition(".")[2] for key, _, _ in changed})
        raise CheckpointError(
            "the recipe is not the one of the checkpoint: "
            + "; ".join(f"{key} is {new!r} and was {old!r}" for key, old, new in changed),
            where=str(choice.checkpoint.path),
            fix=f"put it back, go on with --allow {','.join(words)}, or start a new run under another name",
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint that has just been published, known to every rank.

    Attributes:
        path: its folder.
        step: its optimizer step.
        blocked_s: seconds that training stood still for it, on this rank.
        seconds: from the beginning of the save until it was published (rank 0; 0 elsewhere).
    """

    path: Path
    step: int
    blocked_s: float
    seconds: float


@dataclass(kw_only=True)
class Checkpointer:
    """Writes and reads the checkpoints of one run; every rank calls the same methods at the same steps.

    Attributes:
        engine: the run's engine.
        world: its processes.
        folder: the run's.
        attempt: number of this attempt, part of the temporary folder's name.
        retention: which checkpoints stay.
        contents: what every manifest of this run carries, see the checkpoint contract.
        published: the run's checkpoints in its object store; None where it lies in a folder.
    """

    engine: Engine
    world: World
    folder: RunDir
    attempt: int
    retention: Retention
    contents: RunContents
    published: PublishedCheckpoints | None = None
    _host: HostState = field(default_factory=HostState)
    _save: Save | None = None
    _whole: Consolidation | None = None
    _number: int = 0
    _failures: int = 0
    _blocked_s: float = 0.0

    def begin(self, step: int, *, cursor: Cursor, metrics: Mapping[str, float]) -> None:
        """Copy the state after `step` to the host and begin to write it; no save may be under way.

        `cursor` is where the data stand, `metrics` the last ones; both are the same on every rank.
        """
        assert self._save is None, "the save before this one must be finished first"
        began = time.monotonic()
        self._number += 1
        self._host.copy_from(self.engine, self.world.rank, self.world.size)
        parent = checkpoints_folder(self.folder.path)
        self._save = Save(
            step,
            parent / f".attempt-{self.attempt}.{self._number}-{step_name(step)}",
            parent / step_name(step),
            RankPart(rank=self.world.rank, slices=self._host.tensors, random=rng_state.capture()),
            self._upload(step),
        )
        if self.world.is_main:
            self._whole = self._describe(step, cursor, metrics)
        self._blocked_s = time.monotonic() - began

    def vote(self, *, stop: bool = False) -> Vote:
        """What this rank has to say of the save under way, if any."""
        save = self._save
        if save is None:
            return Vote(stop=stop)
        return Vote(
            stop=stop,
            written=save.files is not None,
            failed=save.problem is not None,
            published=save.published,
            save=self._number,
        )

    def advance(self, outcome: Vote) -> Published | None:
        """Move the save along by what the ranks have voted; returns the checkpoint once it is published.

        Raises:
            CheckpointError: it failed, on every rank; earlier checkpoints are untouched.
        """
        save = self._save
        if save is None or outcome.save != self._number:
            return None  # the outcome belongs to an earlier save
        if outcome.failed:
            self._fail(save)
        if outcome.published:
            self._save, self._failures = None, 0
            self._clear(save)
            return Published(path=save.final, step=save.step, blocked_s=self._blocked_s, seconds=save.seconds)
        if outcome.written and not save.complete:
            began = time.monotonic()
            save.complete = True
            described = self.world.all_gather(save.files or {})
            if self.world.is_main:
                assert self._whole is not None
                merged = {name: entry for part in described for name, entry in part.items()}
                save.publish(self._whole, merged, self._retire(save.step, self._whole))
            self._blocked_s += time.monotonic() - began
        return None

    def finish(self, rank_status: RankStatus, *, stop: bool = False) -> Published | None:
        """Wait until the save under way, if any, is published.

        Raises:
            CheckpointError: it failed, the same on every rank.
        """
        began = time.monotonic()
        while self._save is not None:
            self._save.wait()
            waited = self._blocked_s + time.monotonic() - began
            published = self.advance(rank_status.exchange_now(self.vote(stop=stop)))
            if published is not None:
                return Published(path=published.path, step=published.step, blocked_s=waited, seconds=published.seconds)
        return None

    def tolerates_failure(self, *, last: bool) -> bool:
        """Whether training may go on after a failed save; the last one must succeed."""
        return not last and self._failures <= _FAILURES_TOLERATED

    def find(self, *, brings: bool) -> Choice:
        """The newest verified checkpoint of the run, in this node's folder; the same on every rank.

        Args:
            brings: whether this rank fetches what its node lacks from an object store.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
        """
        path, published, nothing = self.folder.path, self.published, (Choice(checkpoint=None), None)
        if published is None:
            return self.world.broadcast(find_checkpoint(path) if self.world.is_main else nothing[0])
        choice, entry = self.world.broadcast(published.choose(path) if self.world.is_main else nothing)
        return published.on_every_node(choice, entry, path, self.world, brings=brings)

    def load(self, checkpoint: Checkpoint, seed: int) -> int:
        """Bring the engine back to a checkpoint, and the random states where as many ranks wrote it; return its step.

        On another number of ranks, and from a checkpoint that has none as JSON, the random states are seeded again from
        `seed` and the step.

        Raises:
            CheckpointError: the trainable tensors are not those of this model.
        """
        manifest = checkpoint.manifest
        ours = {place.name: list(place.shape) for place in self.engine.trainables.tensors}
        theirs = {name: entry["shape"] for name, entry in manifest["trainable"].items()}
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(
                f"the checkpoint holds other trainable tensors than this model: {', '.join(differing[:3])}{more}",
                where=str(checkpoint.path),
                fix="continue with the recipe of the run, or use another run name",
            )
        step, ranks = manifest["step"], manifest["world_size"]
        put_back(
            self.engine,
            checkpoint.path,
            rank=self.world.rank,
            ranks=self.world.size,
            saved_ranks=ranks,
            updates=manifest["updates"],
        )
        self._load_buffers(checkpoint.path / WEIGHTS)
        random = random_file(self.world.rank)
        if ranks == self.world.size and random in manifest["files"]:
            rng_state.restore_from(checkpoint.path / random)
        else:
            if ranks == self.world.size and self.world.rank == 0:
                log.warning(
                    "%s keeps random states in an old form that is not read; they are drawn anew", checkpoint.path
                )
            rng_state.seed_all(seed + 1000 * (self.world.rank + 1) + 7919 * step)
        return step

    def _place(self, step: int) -> str:
        """Name of a save's folder in an object store: no other save, of this attempt or another, has it."""
        return f"{step_name(step)}.{self.attempt}.{self._number}"

    def _upload(self, step: int) -> Upload | None:
        if self.published is None:
            return None
        return StoreUpload(self.published, step, self._place(step), self.world.size)

    def _retire(self, step: int, whole: Consolidation) -> Callable[[], object]:
        """What deletes old checkpoints once this one is published."""
        published, place = self.published, self._place(step)
        if published is None:
            return lambda: self.retention.apply(self.folder.path)
        return lambda: published.retire(place, whole.contents["metrics"], self.retention, self.folder.path)

    def _clear(self, save: Save) -> None:
        """A node without rank 0 still has its parts where the nodes share no folder."""
        if self.published is not None:
            shutil.rmtree(save.temporary, ignore_errors=True)

    def _describe(self, step: int, cursor: Cursor, metrics: Mapping[str, float]) -> Consolidation:
        """What rank 0 adds to the parts."""
        trainables = self.engine.trainables
        shapes = {place.name: (tuple(place.shape), trainables.flats[place.flat].dtype) for place in trainables.tensors}
        return Consolidation(
            contents={
                **self.contents,
                "step": step,
                "updates": self._host.updates,
                "attempt": self.attempt,
                "world_size": self.world.size,
                "created": time.strftime(CREATED, time.gmtime()),
                "cursor": cursor,
                "metrics": dict(metrics),
                "trainable": {
                    name: {"shape": list(shape), "dtype": str(dtype)} for name, (shape, dtype) in shapes.items()
                },
                "versions": library_versions(),
            },
            ranks=self.world.size,
            trainable=shapes,
            buffers=self._persistent_buffers(),
            allowed=lambda: self.folder.check_attempt(self.attempt),
        )

    def _load_buffers(self, weights: Path) -> None:
        import torch
        from safetensors import safe_open

        with torch.no_grad(), safe_open(str(weights), framework="pt") as saved:
            for name, buffer in self._buffers():
                buffer.copy_(saved.get_tensor(name))

    def _persistent_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().to("cpu", copy=True).contiguous() for name, buffer in self._buffers()}

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Buffers that belong to the model's state; those that stand for frozen weights are not persistent."""
        return [
            (f"{path}.{name}" if path else name, buffer)
            for path, module in self.engine.stage.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]

    def _fail(self, save: Save) -> None:
        save.wait()
        problems = self.world.all_gather(save.problem)
        if self.world.is_main:
            shutil.rmtree(save.temporary, ignore_errors=True)  # a full disk needs the room
            if self.published is not None:
                self.published.forget(self._place(save.step))
        self._clear(save)
        self._save = None
        self._failures += 1
        raise CheckpointError(
            f"the checkpoint of step {save.step} could not be written: "
            + "; ".join(f"rank {rank}: {why}" for rank, why in enumerate(problems) if why),
            where=str(save.final),
            fix="earlier checkpoints are untouched; make room or restore access, then start the run again",
        )


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a checkpoint depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
