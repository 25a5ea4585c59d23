"""Brings a run from an object store to this machine, for what only reads it: status, evaluation, later stages."""

from __future__ import annotations

from pathlib import Path

from echox.config.paths import is_url, run_dir
from echox.engine.checkpoint.manifest import WEIGHTS, Checkpoint
from echox.engine.monitor.run_dir import ATTEMPT
from echox.engine.object_store.checkpoints import PublishedCheckpoints
from echox.engine.object_store.mirror import Mirror
from echox.engine.object_store.run_store import RunStore
from echox.errors import CheckpointError


def local_logs(run: str | Path) -> Path:
    """The folder of a run with its logs, metrics and progress: the run itself, or this machine's copy.

    Raises:
        CheckpointError: there is no such run, or it may not be read.
    """
    if not is_url(str(run)):
        return Path(run)
    store, folder = _open(str(run))
    Mirror(store, folder).bring()
    return folder


def local_checkpoint(run: str) -> Checkpoint | None:
    """The newest good checkpoint of a run in a store, in this machine's copy; None where it has none.

    Its weights alone come, once for all processes of this machine, and are verified; so do the logs.

    Raises:
        CheckpointError: there is no such run, all checkpoints are damaged, or it may not be read.
    """
    folder = local_logs(run)
    return PublishedCheckpoints(_open(run)[0]).choose(folder, (WEIGHTS,))[0].checkpoint


def local_run(run: str | Path) -> Path:
    """The folder of a run, or this machine's copy of one in a store, with the weights of its newest checkpoint.

    Raises:
        CheckpointError: as `local_checkpoint` does.
    """
    if is_url(str(run)):
        local_checkpoint(str(run))
    return local_logs(run)


def bring_checkpoints(run: str | Path, *, whole: bool) -> tuple[Path, dict[str, str]]:
    """Bring all checkpoints of a run in a store; a folder is returned as it is.

    Args:
        run: folder, or URL.
        whole: with all files, which are verified; else the manifests alone.

    Returns:
        The folder, and what is wrong with checkpoints by name.
    """
    if not is_url(str(run)):
        return Path(run), {}
    store, folder = _open(str(run))
    published, problems = PublishedCheckpoints(store), {}
    for entry in published.entries():
        try:
            published.bring(entry, folder, None if whole else ())
        except CheckpointError as error:
            problems[entry["folder"]] = str(error)
    return folder, problems


def _open(run: str) -> tuple[RunStore, Path]:
    storage, _, name = run.rstrip("/").rpartition("/")
    store = RunStore(f"{storage}/{name}")
    if not any(store.read(known) is not None for known in (ATTEMPT, "progress.json")):
        raise CheckpointError("there is no run here", where=run, fix="name a run, such as s3://bucket/runs/3b-s2t")
    return store, run_dir(storage, name)
