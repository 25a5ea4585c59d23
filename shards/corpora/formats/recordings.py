"""Reads a folder of recordings that nobody has listed: each file is an utterance, with the text beside it, if any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.corpora.formats.rows import Line, Unusable
from shards.corpus import sorted_paths

_SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au", ".w64", ".m4a", ".wma")
"""Of what people call recordings; some of them libsndfile cannot decode, and the build says which."""
_TEXTS = (".txt", ".lab")
_LARGEST = 1 << 20


def sounds(source: Path) -> Iterator[Path]:
    """Sound files of a folder, hidden ones left out."""
    if source.is_dir():
        for path in sorted_paths(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.suffix.lower() in _SOUNDS and not hidden:
                yield path


def rows(source: Path) -> Iterator[Line]:
    """A row for each file."""
    for path in sounds(source):
        name = path.relative_to(source).as_posix()
        try:
            yield name, {"id": name, "audio": name, "text": _text(path)}
        except Unusable as problem:
            yield name, problem


def _text(sound: Path) -> str | None:
    for path in (sound.with_suffix(suffix) for suffix in _TEXTS):
        if path.is_file():
            if path.stat().st_size > _LARGEST:
                raise Unusable(f"{path.name} is larger than {_LARGEST >> 20} MiB")
            try:
                return path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise Unusable(f"{path.name} cannot be read: {error}") from error
    return None
