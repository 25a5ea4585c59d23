"""Writes a folder that appears under its name only when it is complete."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from echox.errors import DataError
from echox.files import fsync, is_within, rename_to_free


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its name at the end; after an error nothing of it is left.

    Raises:
        DataError: something lies under the name already, or the disk takes no more.
    """
    check_free(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync(temporary)
        if out.is_dir():
            out.rmdir()
        rename_to_free(temporary, out)
        fsync(out.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(
            f"the folder cannot be written: {why}", where=str(out), fix="make room, or name another"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def belongs(folder: Path, path: Path) -> bool:
    """Whether a file of a model folder, every link followed, is the folder's own.

    That of a hub's cache is too: its folders of snapshots hold links to the files of one folder beside them.
    """
    return is_within(folder, path) or is_within(folder.parent.parent / "blobs", path)


def copy_own(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy the files of these names that a folder has; a link that leads out of it is not followed."""
    for name in names:
        if (source / name).is_file() and belongs(source, source / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def check_free(out: Path) -> None:
    """Raise DataError unless nothing, or an empty folder, lies under a name."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise DataError("there is something under this name already", where=str(out), fix="name a new folder")
