"""Writes the SHA-256 of a model folder's files when it is published, and checks them before it is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echox.errors import AlteredModelError, MissingModelError
from echox.files import sha256_file

SUMS_NAME = "SHA256SUMS"


def write_sums(folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Write `SHA256SUMS`, a JSON of every file's hash and size, into `folder`.

    Args:
        folder: a complete model folder.
        source: where the files came from (repository and revision, or packages with their hashes).

    Returns:
        What was written: {"version", "source", "files": {relative name: {"sha256", "bytes"}}}.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SUMS_NAME
    }
    sums = {"version": 1, "source": source, "files": files}
    (folder / SUMS_NAME).write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return sums


def read_sums(folder: Path) -> dict[str, Any]:
    """The content of a folder's `SHA256SUMS`.

    Raises:
        MissingModelError: no folder or no readable list in it.
    """
    try:
        sums: dict[str, Any] = json.loads((folder / SUMS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MissingModelError(
            f"No readable {SUMS_NAME} in {folder}", where=str(folder), fix="Delete the folder and fetch it again."
        ) from error
    return sums


def verify(folder: Path, *, full: bool = True) -> None:
    """Check every file of a fetched folder against its `SHA256SUMS`.

    Args:
        folder: a folder that `write_sums` was called on.
        full: hash the bytes; otherwise compare sizes only (instant).

    Raises:
        MissingModelError: the folder, its list or one of its files is absent.
        AlteredModelError: a file's size or hash is not the recorded one.
    """
    fix = f"Delete {folder} and fetch it again."
    for name, entry in read_sums(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise MissingModelError(f"Model file {name} is missing", where=str(folder), fix=fix)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise AlteredModelError(
                f"Model file {name} has {size} bytes instead of {entry['bytes']}", where=str(folder), fix=fix
            )
        if full and (found := sha256_file(path)) != entry["sha256"]:
            raise AlteredModelError(
                f"Model file {name} was altered: SHA-256 {found[:12]}… instead of {entry['sha256'][:12]}…",
                where=str(folder),
                fix=fix,
            )
