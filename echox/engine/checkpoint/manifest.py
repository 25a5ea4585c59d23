"""Writes and verifies the manifests of checkpoint folders, lists the folders, and publishes them by rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from echox.engine.checkpoint.contents import Contents, FileEntry, Manifest
from echox.errors import CheckpointError
from echox.files import LARGEST_JSON, fsync, names_inside, parse_json, read_regular, rename_to_free, sha256_file
from echox.stream.storage.retry import PassingError, Retry, may_pass

MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"
EXPORTED = "speech.safetensors"
"""The weights of a folder that `echox export` or `echox import` wrote: a checkpoint that only speaks, with its LLM."""
VERSION = 2
CREATED = "%Y-%m-%dT%H:%M:%SZ"
"""How a manifest writes its time, which is UTC."""

_STEP = re.compile(r"step-(\d{8})")


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Optimizer step in the name of a published checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def weights_name(checkpoint: Path) -> str:
    """Name of the file with a checkpoint's weights: that of a run, or of an exported folder."""
    return EXPORTED if (checkpoint / EXPORTED).is_file() else WEIGHTS


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Published checkpoints of a run, newest first; not verified."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), reverse=True)


def newest_manifest(run_folder: Path) -> Path | None:
    """Manifest of the newest published checkpoint of a run, not verified; None if there is none."""
    manifests = (checkpoint / MANIFEST for checkpoint in list_checkpoints(run_folder))
    return next((manifest for manifest in manifests if manifest.is_file()), None)


def write_manifest(folder: Path, contents: Contents, files: Mapping[str, FileEntry]) -> None:
    """Write the manifest over `files` (relative name to bytes and sha256), sealed by its own hash, and fsync it."""
    body = {"version": VERSION, **contents, "files": dict(sorted(files.items()))}
    path = folder / MANIFEST
    path.write_text(json.dumps({**body, "sha256": _seal(body)}, indent=1, sort_keys=True))
    fsync(path)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync(inner)
    fsync(folder)


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file for the manifest, which is also forced to disk."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, of another version, or does not match its own hash.
    """
    path = checkpoint / MANIFEST
    try:
        return parse_manifest(read_regular(path, LARGEST_JSON), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {checkpoint.name} has no {MANIFEST}", where=str(checkpoint)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}", where=str(path)) from None


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes; raises as `read_manifest` does."""
    try:
        manifest = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}", where=where) from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise CheckpointError(f"{MANIFEST} does not match its own hash", where=where)
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{MANIFEST} has version {manifest.get('version')}, not {VERSION}", where=where)
    if not _well_formed(manifest):
        raise CheckpointError(f"{MANIFEST} has fields of other types than a run writes", where=where)
    return cast(Manifest, manifest)


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether the fields that every reader uses are of their types, and files lie in the checkpoint's folder.

    Whoever changes a manifest can seal it again, and checkpoints travel between people.
    """
    files = manifest.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and names_inside(name)
        for name, entry in files.items()
    )


def verify(checkpoint: Path, only: Iterable[str] | None = None) -> Manifest:
    """Check every file of a checkpoint (or `only` some) against its manifest; return the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of another content.
        TransientReadError: the storage could not be read, however often; nothing is known of the checkpoint.
    """

    def once() -> Manifest:
        try:
            return _verify(checkpoint, only)
        except OSError as error:
            if may_pass(error):
                raise PassingError(f"{type(error).__name__}: {error}") from error
            raise

    return Retry()(once, f"verifying {checkpoint.name}", str(checkpoint))


def _verify(checkpoint: Path, only: Iterable[str] | None) -> Manifest:
    manifest = read_manifest(checkpoint)
    for name in manifest["files"] if only is None else only:
        expected = manifest["files"].get(name)
        path = checkpoint / name
        if expected is None or not path.is_file():
            raise CheckpointError(f"{name} is missing", where=str(checkpoint))
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}", where=str(checkpoint)
            )
        if sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"{name} does not match its hash", where=str(checkpoint))
    return manifest


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was verified: its folder, and its manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The newest checkpoint that verifies, and the newer ones that do not.

    Attributes:
        checkpoint: None when the run has no checkpoint at all.
        rejected: folder and reason of each newer, damaged one.
    """

    checkpoint: Checkpoint | None
    rejected: tuple[tuple[Path, str], ...] = ()


def choose(candidates: Iterable[Path], only: Iterable[str] | None = None) -> Choice:
    """Pick the first candidate that verifies.

    Raises:
        CheckpointError: there are candidates and all are damaged.
    """
    rejected: list[tuple[Path, str]] = []
    for candidate in candidates:
        try:
            manifest = verify(candidate, only)
        except CheckpointError as error:
            rejected.append((candidate, error.what))
            continue
        return Choice(checkpoint=Checkpoint(path=candidate, manifest=manifest), rejected=tuple(rejected))
    if rejected:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in rejected)
        raise CheckpointError(
            f"every checkpoint is damaged ({reasons})",
            where=str(rejected[0][0].parent),
            fix="restore one from a copy, or move the folder away to start over",
        )
    return Choice(checkpoint=None)


def publish(temporary: Path, final: Path) -> None:
    """Publish a complete checkpoint under its name, atomically; an older one under that name is moved away first."""
    if final.exists():
        discard(final)
    rename_to_free(temporary, final)
    fsync(final.parent)


def discard(path: Path) -> None:
    """Delete a checkpoint, taking its name away first so that no reader meets half of one."""
    doomed = path.with_name(f".deleting-{path.name}-{os.getpid()}")
    rename_to_free(path, doomed)
    fsync(path.parent)  # the name must be gone on disk before the first file is
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint's name away and keep it for inspection; returns where it is."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    rename_to_free(path, aside)
    return aside


def sweep(run_folder: Path) -> None:
    """Remove what earlier attempts left unfinished: temporary folders and half-deleted checkpoints."""
    folder = checkpoints_folder(run_folder)
    for path in folder.glob(".*-step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
