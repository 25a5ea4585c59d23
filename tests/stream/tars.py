"""Tars as other tools write them, and ways to damage them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset

File = tuple[str, bytes]


def write_tar(path: Path, files: Iterable[File], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A plain tar through the standard library."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def meta(number: int) -> bytes:
    return json.dumps({"id": f"s{number}", "question_s": 1.0, "question_text": f"text {number}"}).encode()


def files(samples: int, first: int = 0) -> list[File]:
    """Three members a sample, the middle one longer than a tar block."""
    names = range(first, first + samples)
    return [
        file
        for n in names
        for file in (
            (f"s{n:03d}.question.flac", bytes([n % 251]) * 40),
            (f"s{n:03d}.answer.units", bytes([n % 251, 0]) * 700),
            (f"s{n:03d}.json", meta(n)),
        )
    ]


def header_of(path: Path, name: str) -> int:
    """Offset of a member's header, by the standard library."""
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def plain_webdataset(*paths: Path, tolerant: bool = False) -> list[dict[str, Any]]:
    """What webdataset's own reader makes of shards; tolerant as its users run it, with faults skipped."""
    handler = webdataset.handlers.ignore_and_continue if tolerant else webdataset.handlers.reraise_exception
    urls = [str(path) for path in paths]
    return list(webdataset.WebDataset(urls, shardshuffle=False, handler=handler, empty_check=False))
