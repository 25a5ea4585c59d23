"""Reads long recordings with subtitles beside them (`talk.mp3`, `talk.srt`): each caption is an utterance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from shards.corpora.formats.rows import Line, Unusable
from shards.corpus import sorted_paths

_CAPTIONS = (".srt", ".vtt", ".ass")
_SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_ASIDE = re.compile(r"[\[［【][^\]］】]*[\]］】]|[(（][^)）]*[)）]|♪[^♪]*♪?")
"""What nobody says: [music], (laughs), （笑い）."""
_LARGEST = 64 << 20


def captions(source: Path) -> list[Path]:
    """Subtitle files of a folder, or the one that is named."""
    found = [source] if source.is_file() else sorted_paths(source.rglob("*"))
    return [path for path in found if path.suffix.lower() in _CAPTIONS]


def rows(source: Path) -> Iterator[Line]:
    """A row for each caption of each file."""
    folder = source if source.is_dir() else source.parent
    for path in captions(source):
        sound = next((each for suffix in _SOUNDS if (each := path.with_suffix(suffix)).is_file()), None)
        if sound is None:
            yield path.name, Unusable("no recording of its name beside it")
            continue
        yield from _of_file(path, sound.relative_to(folder).as_posix())


def _of_file(path: Path, sound: str) -> Iterator[Line]:
    import pysubs2

    try:
        if path.stat().st_size > _LARGEST:
            raise Unusable(f"larger than {_LARGEST >> 20} MiB")
        found = pysubs2.load(str(path), encoding="utf-8")
    except (Unusable, OSError, ValueError, pysubs2.Pysubs2Error) as error:
        yield path.name, error if isinstance(error, Unusable) else Unusable(f"no subtitles: {error}")
        return
    for number, caption in enumerate(found, 1):
        text = " ".join(_ASIDE.sub(" ", caption.plaintext).split())
        span = {"offset": caption.start / 1000, "duration": caption.duration / 1000}
        usable = bool(text) and caption.duration > 0
        yield (
            f"caption {number} of {path.name}",
            {"audio": sound, "text": text, **span} if usable else Unusable("a caption in which nobody says anything"),
        )
