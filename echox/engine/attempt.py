"""Keeps the promises of every attempt at a run: the same data on all ranks, and an end that is told in every case."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from echox.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from echox.engine.checkpoint.manifest import Checkpoint
    from echox.engine.interfaces import TrainLoader, TrainResult
    from echox.engine.monitor.reporter import Reporter
    from echox.engine.world import World


def tell_the_end(reporter: Reporter, tags: Mapping[str, str], work: Callable[[], TrainResult]) -> TrainResult:
    """Do the work of an attempt; the tracker, and where it fails the event log, are told how it ended.

    Args:
        reporter: of this rank, at the step that the attempt begins with.
        tags: of the attempt.
        work: trains.
    """
    reporter.tracker.begin_attempt(reporter.attempt, reporter.state.step, tags)
    try:
        result = work()
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        reporter.event("failed", error=said)
        reporter.progress("failed")
        reporter.tracker.end_attempt(
            "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", {"ended": said[:500]}
        )
        raise
    ended = f"stopped: {result.stopped}" if result.stopped else "finished"
    reporter.tracker.end_attempt("KILLED" if result.stopped else "FINISHED", {"ended": ended})
    return result


def start_data(
    loader: TrainLoader, checkpoint: Checkpoint | None, world: World, reporter: Reporter, *, accept_new_data: bool
) -> None:
    """Bring the data to where the checkpoint stood, after all ranks were found to see the same.

    Raises:
        DataError: ranks see different data.
        CheckpointError: the data are not those of the checkpoint.
    """
    identities = world.all_gather(json.dumps(loader.identity(), sort_keys=True))
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise DataError(
                f"rank {rank} sees other training data than rank 0",
                where=str(reporter.folder.path),
                fix="give every node the same datasets, best in a folder that all of them share",
            )
    for clause in loader.start(
        step=0 if checkpoint is None else checkpoint.manifest["step"],
        run_folder=reporter.folder.path,
        saved=None if checkpoint is None else checkpoint.manifest["cursor"]["stream"],
        accept_new_data=accept_new_data,
    ):
        reporter.event("new_data", what=clause)


def unwritable(folder: Path, error: OSError) -> CheckpointError:
    """What a run's folder that cannot be written ends an attempt with."""
    return CheckpointError(
        f"the run's folder cannot be written: {error}",
        where=str(folder),
        fix="make room, or give storage= a folder that every node may write to",
    )
