"""Reads prompt lists of speech synthesis: festvox (also CMU ARCTIC) and LJSpeech, each a folder with its recordings.

A voice of festvox has `etc/txt.done.data`, whose lines are Scheme lists `( name "what was said" )`, and `wav/name.wav`.
LJSpeech has `metadata.csv`, `name|as written|as said` without a header, and `wavs/name.wav`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from echox.errors import DataError
from shards.corpora.formats.rows import Line, Row, Unusable, beginning, text_lines

_PROMPTS, _METADATA = Path("etc", "txt.done.data"), "metadata.csv"
_PROMPT = re.compile(r'\s*\(\s*([^\s()"]+)\s+"((?:[^"\\]|\\.)*)"\s*\)\s*')
_ESCAPED = re.compile(r"\\(.)")
_COMMENT = ";"


def is_festvox(source: Path) -> bool:
    """Whether it is the folder of a festvox voice, or the list in it."""
    return (source / _PROMPTS).is_file() or source.is_file() and source.name == _PROMPTS.name


def is_ljspeech(source: Path) -> bool:
    """Whether it is a folder like LJSpeech; an audiofolder has `metadata.csv` too, with names of columns."""
    first = beginning(source / _METADATA).partition("\n")[0]
    return "|" in first and "file_name" not in first and (source / "wavs").is_dir()


def festvox_rows(folder: Path) -> Iterator[Line]:
    """A row for each prompt.

    Raises:
        DataError: the list alone is named, from whose folder no recording can be.
    """
    if folder.is_file():
        fix = "name the folder that has etc and wav in it"
        what = "the recordings of a festvox list lie in the wav folder beside its own"
        raise DataError(what, where=str(folder), fix=fix)
    lines = ((where, line) for where, line in text_lines(folder / _PROMPTS) if not _is_comment(line))
    return _read(lines, _prompt)


def ljspeech_rows(folder: Path) -> Iterator[Line]:
    """A row for each line of the list."""
    return _read(text_lines(folder / _METADATA), _listed)


def _read(lines: Iterator[tuple[str, str | Unusable]], parsed: Callable[[str], Row]) -> Iterator[Line]:
    for where, line in lines:
        try:
            yield where, line if isinstance(line, Unusable) else parsed(line)
        except Unusable as problem:
            yield where, problem


def _is_comment(line: str | Unusable) -> bool:
    return isinstance(line, str) and line.lstrip().startswith(_COMMENT)


def _prompt(line: str) -> Row:
    found = _PROMPT.fullmatch(line)
    if found is None:
        raise Unusable('not ( name "what was said" )')
    name, text = found.groups()
    return {"id": name, "audio": f"wav/{name}.wav", "text": _ESCAPED.sub(r"\1", text)}


def _listed(line: str) -> Row:
    name, *texts = (cell.strip() for cell in line.split("|"))
    if not name or not 1 <= len(texts) <= 2:
        raise Unusable("not name|as written, or name|as written|as said")
    name = name.removesuffix(".wav")
    return {"id": name, "audio": f"wavs/{name}.wav", "text": texts[-1] or texts[0]}
