"""Writes one checkpoint in the background of training: every rank its part, then rank 0 completes and publishes it.

The order is the protocol. Each rank writes its slices and random states into the attempt's temporary folder, forces
them to disk and hashes them. When all have said so, rank 0 adds the consolidated weights and the manifest over all
files, forces everything to disk, and publishes the folder by a rename: until then no reader takes it for a checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from echox.engine import rng_state
from echox.engine.checkpoint.contents import Contents, FileEntry
from echox.engine.checkpoint.manifest import WEIGHTS, describe_file, publish, write_manifest
from echox.engine.checkpoint.sharded_state import FOLDER, SavedSlices, slices_file
from echox.errors import CheckpointError
from echox.files import fsync

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Files = dict[str, FileEntry]


def random_file(rank: int) -> str:
    """Name of a rank's random states inside a checkpoint."""
    return f"rng/rank-{rank:05d}.json"


def part_files(ranks: int) -> list[str]:
    """Names of the files that the ranks of a run write inside a checkpoint."""
    return [name for rank in range(ranks) for name in (slices_file(rank), random_file(rank))]


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """What one rank contributes: host copies that nothing changes until the part is written."""

    rank: int
    slices: Mapping[str, Tensor]
    random: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Consolidation:
    """What rank 0 adds.

    Attributes:
        contents: the manifest, without the list of files.
        ranks: number of parts.
        trainable: name to shape and dtype of all that trains.
        buffers: persistent buffers of the model.
        allowed: called right before the folder is published; raises where this attempt may no longer do that.
    """

    contents: Contents
    ranks: int
    trainable: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    buffers: Mapping[str, Tensor]
    allowed: Callable[[], None]


def write_part(folder: Path, part: RankPart) -> Files:
    """Write a rank's files and force them to disk; returns size and hash by name."""
    from safetensors.torch import save_file

    for name in (FOLDER, "rng"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    slices, random = slices_file(part.rank), random_file(part.rank)
    save_file(dict(part.slices), str(folder / slices))
    rng_state.save(part.random, folder / random)
    files = {name: describe_file(folder / name) for name in (slices, random)}
    for name in (FOLDER, "rng"):
        fsync(folder / name)
    return files


class Upload(Protocol):
    """Where a checkpoint goes besides the run's folder on this node; every method raises where it could not."""

    def begin(self) -> None:
        """On rank 0, before anything is uploaded."""
        ...

    def part(self, temporary: Path, files: Files) -> None:
        """On every rank: what it has written."""
        ...

    def gather(self, temporary: Path, files: Files) -> None:
        """On rank 0: bring the parts that other nodes have written."""
        ...

    def publish(self, temporary: Path) -> None:
        """On rank 0: the whole weights, and then the manifest."""
        ...


def publish_whole(
    temporary: Path, final: Path, whole: Consolidation, files: Files, upload: Upload | None = None
) -> None:
    """Complete a folder that holds every part, and publish it; in an object store before this node's folder."""
    from safetensors.torch import save_file

    if upload is not None:
        upload.gather(temporary, files)
    with SavedSlices(temporary, whole.ranks) as saved:
        weights = {name: saved.whole(name, shape, dtype) for name, (shape, dtype) in whole.trainable.items()}
    save_file({**weights, **whole.buffers}, str(temporary / WEIGHTS))
    write_manifest(temporary, whole.contents, {**files, WEIGHTS: describe_file(temporary / WEIGHTS)})
    whole.allowed()
    if upload is not None:
        upload.publish(temporary)
    publish(temporary, final)


class Save:
    """The work on one checkpoint, in a thread of this rank.

    Attributes:
        step: optimizer step of the checkpoint.
        final: the name it gets.
        files: this rank's files once they are written.
        problem: why this rank failed, or None.
        complete: whether all ranks' parts are written, as far as this rank was told.
        published: whether the checkpoint is published (rank 0).
        seconds: from the beginning until it was published (rank 0).
    """

    def __init__(self, step: int, temporary: Path, final: Path, part: RankPart, upload: Upload | None = None) -> None:
        self.step, self.temporary, self.final = step, temporary, final
        self._upload = upload
        self.files: Files | None = None
        self.problem: str | None = None
        self.complete = False
        self.published = False
        self.seconds = 0.0
        self._began = time.monotonic()
        self._thread = self._start(lambda: self._write(part))

    def publish(self, whole: Consolidation, files: Files, then: Callable[[], object]) -> None:
        """On rank 0, once all parts are written: make the checkpoint whole in the background, and do `then` after."""
        self._thread = self._start(lambda: self._publish(whole, files, then))

    def wait(self) -> None:
        """Wait until the thread has done what it was last given."""
        self._thread.join()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint", daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointError as error:
            self.problem = error.what
        except Exception as error:  # a full disk comes out of safetensors and torch as errors of their own
            self.problem = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)

    def _write(self, part: RankPart) -> None:
        upload = self._upload
        if upload is not None and part.rank == 0:
            upload.begin()
        files = write_part(self.temporary, part)
        if upload is not None:
            upload.part(self.temporary, files)
        self.files = files

    def _publish(self, whole: Consolidation, files: Files, then: Callable[[], object]) -> None:
        publish_whole(self.temporary, self.final, whole, files, self._upload)
        self.seconds = time.monotonic() - self._began
        then()
        self.published = True
