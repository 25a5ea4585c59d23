"""Recognises by its content in which format somebody lists recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.formats import kaldi, lhotse, messages, moshi, prompts, recordings, subtitles, tables
from shards.corpora.formats.rows import Line, Row, array_rows, beginning, first_object, json_rows, renamed


@dataclass(frozen=True)
class Format:
    """One way to list recordings.

    Attributes:
        name: what its users call it.
        fits: whether a file or folder is in it; reads a little of it.
        rows: its rows, with the fields of a manifest.
        from_root: whether relative paths count from `--audio-root` where that is named, as those of tools do that are
            run in another folder.
    """

    name: str
    fits: Callable[[Path], bool]
    rows: Callable[[Path], Iterator[Line]]
    from_root: bool = False


def _first(path: Path) -> Row:
    return first_object(json_rows(path)) if path.is_file() else {}


def _is_array(path: Path) -> bool:
    return path.is_file() and beginning(path, 64).lstrip().startswith("[")


def _chats(path: Path) -> Iterator[Line]:
    return messages.rows(array_rows(path) if _is_array(path) else json_rows(path))


def _is_table(path: Path) -> bool:
    names = set(tables.header(path)) if path.is_file() and path.suffix in (".csv", ".tsv") else set()
    return bool({"audio", "answer_audio"} & set(renamed(dict.fromkeys(names, "x"))))


def _table_rows(path: Path) -> Iterator[Line]:
    for where, row in tables.csv_rows(path):
        yield where, row if not isinstance(row, dict) else renamed(row)


FORMATS = (
    Format("Kaldi folder", lambda path: (path / "wav.scp").is_file(), kaldi.rows, from_root=True),
    Format("Lhotse cuts", lambda path: lhotse.is_cut(_first(path)), lhotse.rows, from_root=True),
    Format("festvox voice", prompts.is_festvox, prompts.festvox_rows),
    Format("LJSpeech", prompts.is_ljspeech, prompts.ljspeech_rows),
    Format("audiofolder of Hugging Face", lambda path: bool(tables.metadata(path)), tables.audiofolder_rows),
    Format("Common Voice", lambda path: bool(tables.common_voice(path)), tables.common_voice_rows),
    Format("parquet of Hugging Face", lambda path: bool(tables.parquets(path)), tables.parquet_rows),
    Format("subtitles", lambda path: bool(subtitles.captions(path)), subtitles.rows),
    Format("table", _is_table, _table_rows),
    Format("list of chats", lambda path: messages.is_chat(_first_of(path)), _chats),
    Format("list of moshi", lambda path: moshi.is_sound(_first(path)), moshi.rows),
    Format("folder of recordings", lambda path: next(recordings.sounds(path), None) is not None, recordings.rows),
)
"""In the order in which they are tried."""


def _first_of(path: Path) -> Row:
    return first_object(array_rows(path)) if _is_array(path) else _first(path)


MANIFEST = Format("manifest", Path.is_file, json_rows)
"""Lines of ours and NeMo's, which every other file is taken to be."""


def recognised(source: Path) -> Format | None:
    """The format of a file or folder; None for a folder in none, or where nothing is."""
    if not source.exists():
        return None
    return next((each for each in (*FORMATS, MANIFEST) if each.fits(source)), None)
