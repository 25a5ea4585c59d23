"""Finds the members of tars, and reads long JSON lists piece by piece: the two things dialogue corpora are made of."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from echox.errors import DataError
from shards.corpus import MemberAudio, SpanAudio

SUFFIXES = (".tar.gz", ".tgz", ".tar")
_BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, OverflowError, ValueError)
"""What tarfile and gzip raise for a damaged archive, or one that claims places no file has."""
_CHUNK = 1 << 20
_ANY_SIZE, _MOST_TIMES = 1 << 30, 50
"""What a decompressed archive may have in any case, and how many times its packed size beyond that."""
_SPACE = re.compile(r"\s+")
_LONGEST_ITEM = 64 << 20


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar or a gzip'd tar."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The archive's name without its suffixes."""
    return next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))


def _unreadable(archive: Path, error: Exception) -> DataError:
    return DataError(f"Cannot read the archive: {error}", where=str(archive), fix="Download it again.")


class Archives:
    """Where the members of archives lie.

    A gzip'd tar cannot be read from the middle, so it is decompressed into a scratch file the first time one of its
    members is asked for. Only the scratch files still in use are kept.

    Args:
        scratch: folder for decompressed tars.
        progress: called with one line an archive.
    """

    def __init__(self, scratch: Path, progress: Callable[[str], None]) -> None:
        self._scratch = scratch
        self._say = progress
        self._current: Path | None = None
        self._plain = Path()
        self._spans: dict[str, tuple[int, int]] = {}

    def locate(self, audio: MemberAudio) -> SpanAudio | MemberAudio:
        """The member's span; the member itself where the archive has none of that name.

        Raises:
            DataError: the archive is damaged.
        """
        if audio.archive != self._current:
            self._open(audio.archive)
        found = self._spans.get(audio.name)
        return audio if found is None else SpanAudio(self._plain, *found, origin=audio.archive)

    def keep(self, used: set[Path]) -> None:
        """Delete the scratch files that are neither in `used` nor of the archive asked for last."""
        for path in self._scratch.glob("*"):
            if path != self._plain and path not in used:
                path.unlink()

    def _open(self, archive: Path) -> None:
        try:
            plain = archive if archive.name.endswith(".tar") else self._decompress(archive)
            with tarfile.open(plain, "r:") as tar:
                # Of a sparse member the size is not what the file holds.
                self._spans = {
                    member.name.removeprefix("./"): (member.offset_data, member.size)
                    for member in _members(tar)
                    if member.isfile() and not member.issparse()
                }
        except _BROKEN as error:
            raise _unreadable(archive, error) from error
        self._current, self._plain = archive, plain

    def _decompress(self, archive: Path) -> Path:
        state = archive.stat()
        identity = f"{archive.absolute()} {state.st_size} {state.st_mtime_ns}"
        plain = self._scratch / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.tar"
        if not plain.is_file():
            self._say(f"decompressing {archive.name}")
            self._scratch.mkdir(parents=True, exist_ok=True)
            partial = plain.with_suffix(".part")
            most = max(_ANY_SIZE, _MOST_TIMES * state.st_size)
            with gzip.open(archive, "rb") as packed, partial.open("wb") as file:
                while block := packed.read(_CHUNK):
                    file.write(block)
                    if file.tell() > most:
                        partial.unlink()
                        times = f"{_MOST_TIMES} times its {state.st_size:,} bytes"
                        raise DataError(
                            f"The archive grows to more than {times} when it is decompressed, as no sound does",
                            where=str(archive),
                            fix="Leave it out, or decompress it yourself if you know it.",
                        )
            partial.rename(plain)
        return plain


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive; after one of a negative size, the next would be the same one again."""
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError(f"a member has {member.size} bytes")
        yield member


def archived_list(archive: Path, name: str) -> Iterator[Any]:
    """Items of the JSON list that a member of the archive holds, read as a stream up to the end of that member.

    Raises:
        DataError: the archive is damaged, has no such member, or the member is no JSON list.
    """
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in _members(tar):
                if member.isfile() and member.name.rpartition("/")[2] == name:
                    handle = tar.extractfile(member)
                    assert handle is not None
                    yield from json_list(handle, f"{name} of {archive}")
                    return
    except _BROKEN as error:
        raise _unreadable(archive, error) from error
    raise DataError(f"The archive has no {name}", where=str(archive), fix="Download it again, or name another folder.")


def json_list(stream: IO[bytes], where: str) -> Iterator[Any]:
    """Items of a JSON list, without ever holding the list: `train.json` of AudioQA-1M has 1.4 GB.

    Raises:
        DataError: something other than one JSON list, or a list cut short.
    """

    def wrong(what: str) -> DataError:
        return DataError(what, where=where, fix="Download the file again.")

    decoder, text_of = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("replace")
    buffer, at, ended, begun = "", 0, False, False
    while True:
        at = _after_space(buffer, at)
        if at < len(buffer) and not begun:
            if buffer[at] != "[":
                raise wrong("Not a JSON list")
            begun, at = True, at + 1
            continue
        if at < len(buffer) and buffer[at] == "]":
            return
        if at < len(buffer):
            try:
                item, end = decoder.raw_decode(buffer, at)
            except RecursionError as error:
                raise wrong("The JSON is nested too deeply") from error
            except json.JSONDecodeError as error:
                if ended:
                    raise wrong(f"Broken JSON: {error.msg}") from error
                if len(buffer) - at > _LONGEST_ITEM:
                    raise wrong(f"An item of the JSON list is longer than {_LONGEST_ITEM >> 20} MiB") from error
            else:
                # Only what follows tells that a number is whole: it may go on in the next piece.
                end = _after_space(buffer, end)
                if end < len(buffer) and buffer[end] in ",]":
                    yield item
                    at = end + (buffer[end] == ",")
                    continue
        if ended:
            raise wrong("The JSON list is cut short")
        piece = stream.read(_CHUNK)
        buffer, at, ended = buffer[at:] + text_of.decode(piece, final=not piece), 0, not piece


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
