"""Writes small files that no crash, full disk or other reader finds half written, and hashes files of any size."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part, whichever process writes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_line(path: Path, text: str, *, durable: bool = False) -> None:
    """Add a line to a file, on a line of its own even where a crash or a full disk has cut the one before it short.

    Args:
        path: the file, made when absent.
        text: the line, or several, without the last line end.
        durable: force it to disk.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else f"\n{text}"
        file.write(f"{text}\n".encode())
        if durable:
            file.flush()
            os.fsync(file.fileno())
