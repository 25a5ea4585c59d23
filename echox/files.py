"""Writes small files that no crash, full disk or other reader finds half written, reads those of others, and hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

LARGEST_JSON = 32 << 20
"""Bytes of a JSON file that comes from elsewhere; a longer one would take gigabytes as Python objects."""
LARGEST_LINE = 8 << 20
"""Bytes of one line of a file that comes from elsewhere."""
_FOLDER_HAS_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR, errno.ENOSYS)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Hex digests of the files of a folder that match one of the patterns, by their names in it."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor to read a regular file by; a pipe would keep its reader waiting, and a device has no end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # Without O_NONBLOCK, opening a named pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: see `open_regular`.
        ValueError: it has more than `most`.
    """
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        if os.fstat(descriptor).st_size > most:
            raise ValueError(f"{path.name} has more than {most / 2**20:,g} MiB")
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or it is one of /proc, which have no size
        raise ValueError(f"{path.name} has more than {most / 2**20:,g} MiB")
    return content


def read_text(path: Path, most: int = LARGEST_JSON) -> str:
    """All of a regular UTF-8 file of bounded size.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is larger, or not UTF-8.
    """
    return read_regular(path, most).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says, wherever it comes from.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """What a JSON file says, wherever it comes from.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is larger, or see `parse_json`.
    """
    return parse_json(read_regular(path, most))


def read_lines(path: Path, longest: int = LARGEST_LINE) -> Iterator[bytes]:
    """The lines of a regular file one by one, without their ends.

    Raises:
        OSError: see `open_regular`.
        ValueError: a line is longer than `longest`.
    """
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest and not line.endswith(b"\n"):
                raise ValueError(f"{path.name} has a line of more than {longest / 2**20:,g} MiB")
            yield line.rstrip(b"\r\n")


def is_within(folder: Path, path: Path) -> bool:
    """Whether a path, with every link followed, lies in a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def names_inside(name: str) -> bool:
    """Whether a relative name, as records of others may hold one, is of something in the folder it is joined to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that a folder of someone else's may hold under a name; empty where it holds none that can be used.

    A link that leads out of the folder is not followed.
    """
    try:
        found = read_json(folder / name) if is_within(folder, folder / name) else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fsync(path: Path) -> None:
    """Force a file to disk, or a folder where its file system can do that: some network ones cannot, and need not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_HAS_NO_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part, whichever process writes.

    Args:
        path: the file.
        text: all of it.
        durable: force it to disk first, so that no power cut leaves an empty file; False for what is written anew soon.
    """
    # Process ids are not enough: on a shared folder another host, or another container, has the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        _replace(temporary, path, text)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _replace(temporary: Path, path: Path, text: str) -> None:
    try:
        temporary.replace(path)
    except FileNotFoundError:
        if temporary.exists() or path.read_text(encoding="utf-8") != text:  # as in `rename_to_free`
            raise


def rename_to_free(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has.

    NFS sends a rename again when its answer was lost; the second then finds nothing to rename, and has worked.
    """
    try:
        source.rename(target)
    except FileNotFoundError:
        if source.exists() or not target.exists():
            raise


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """A section of code that one process of the node runs at a time; the lock of one that is killed goes with it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def own_file(path: str, flags: int) -> int:
    """An `opener` for files that are added to: the folder may be someone else's, and a link there lead anywhere.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def append_line(path: Path, text: str, *, durable: bool = False) -> None:
    """Add a line to a file, on a line of its own even where a crash or a full disk has cut the one before it short.

    Args:
        path: the file, made when absent.
        text: the line, or several, without the last line end.
        durable: force it to disk.
    """
    with open(path, "ab+", opener=own_file) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else f"\n{text}"
        file.write(f"{text}\n".encode())
        if durable:
            file.flush()
            os.fsync(file.fileno())
