"""Reads and writes the objects of one run, whichever store fsspec opens, and tries again what may pass."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from echox.config.paths import is_url
from echox.engine.checkpoint.contents import FileEntry
from echox.errors import CheckpointError, printable
from echox.files import sha256_file
from echox.stream.storage.remote import open_filesystem, reason
from echox.stream.storage.retry import PassingError, Retry

T = TypeVar("T")


class RunStore:
    """The objects below one URL.

    Args:
        location: URL of a run, such as `s3://bucket/runs/3b-s2t`. Who may read and write is the environment's matter.
        retry: how often an operation is tried.
    """

    def __init__(self, location: str, retry: Retry | None = None) -> None:
        self.location = location.rstrip("/")
        self._retry = retry or Retry()
        # An old listing in its cache would deny what has been written since, by this process or another.
        self._fs, self._root = open_filesystem(self.location, use_listings_cache=False)

    @classmethod
    def of(cls, storage: str, name: str) -> RunStore | None:
        """The store of a run below `storage`; None where that is a folder."""
        return cls(f"{storage.rstrip('/')}/{name}") if is_url(storage) else None

    def filesystem(self) -> tuple[Any, str]:
        """fsspec's file system, and the path of the run in it."""
        return self._fs, self._root

    def where(self, name: str) -> str:
        """URL of an object."""
        return f"{self.location}/{name}"

    def read(self, name: str) -> bytes | None:
        """An object's bytes, or None where there is no such object.

        Raises:
            CheckpointError: it may not be read.
            TransientReadError: it could not be read, however often.
        """

        def ask(path: str) -> bytes | None:
            try:
                data: bytes = self._fs.cat_file(path)
            except FileNotFoundError:
                return None
            return data

        return self._tried("reading", name, ask)

    def write(self, name: str, data: bytes) -> None:
        """Replace an object.

        Raises:
            CheckpointError: it may not be written, or the bucket does not exist.
            TransientReadError: it could not be written, however often.
        """
        self._tried("writing", name, lambda path: self._fs.pipe_file(path, data))

    def upload(self, path: Path, name: str) -> None:
        """Replace an object by a file; raises as `write` does, and where less arrived than was sent."""

        def put(target: str) -> None:
            self._fs.put_file(str(path), target)
            arrived = self._fs.info(target)["size"]
            if arrived != path.stat().st_size:
                raise PassingError(f"{arrived} of {path.stat().st_size} bytes arrived")

        self._tried("uploading", name, put)

    def download(self, name: str, path: Path, expected: FileEntry | None = None) -> bool:
        """Bring an object to a file, whole or not at all; False where there is no such object.

        Raises:
            CheckpointError: it is not what is `expected`, or may not be read.
            TransientReadError: it could not be read, however often.
        """
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)

        def get(source: str) -> bool:
            try:
                self._fs.get_file(source, str(temporary))
            except FileNotFoundError:
                return False
            return True

        try:
            found = self._tried("downloading", name, get)
            if found and expected is not None:
                self._compare(temporary, name, expected)
            if found:
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return found

    def remove(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""

        def delete(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

        self._tried("deleting", name, delete)

    def listed(self, folder: str = "") -> dict[str, str]:
        """Names below a folder, to a word that changes when the object does; a store may not know the newest yet."""

        def ask(path: str) -> dict[str, str]:
            try:
                found = self._fs.ls(path.rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            inside = self._root.rstrip("/") + "/"
            files = [each for each in found if each["type"] == "file" and each["name"].startswith(inside)]
            return {each["name"].removeprefix(inside): _version(each) for each in files}

        return self._tried("listing", folder, ask)

    def _compare(self, path: Path, name: str, expected: FileEntry) -> None:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, not {expected['bytes']}", where=self.where(name))
        if sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"{name} does not match its hash", where=self.where(name))

    def _tried(self, what: str, name: str, operation: Callable[[str], T]) -> T:
        def once() -> T:
            try:
                return operation(f"{self._root}/{name}")
            except (PermissionError, FileNotFoundError) as error:
                raise self._refused(what, name, error) from error
            except (PassingError, CheckpointError):
                raise
            except Exception as error:
                # Every store's client has errors of its own; what is neither absence nor refusal may pass.
                raise PassingError(reason(error)) from error

        return self._retry(once, f"{what} {name or 'the run'}", self.location)

    def _refused(self, what: str, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{what} {name or 'the run'} is refused by the object store: {printable(reason(error))}",
            where=self.location,
            fix="create the bucket, or give every node credentials that may read, write and delete there",
        )


def _version(entry: dict[str, Any]) -> str:
    return f"{entry.get('size')} {entry.get('ETag') or entry.get('etag') or entry.get('LastModified')}"
