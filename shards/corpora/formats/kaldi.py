"""Reads Kaldi data folders: `wav.scp` and `text`, with `segments`, `utt2spk` and channels where they are there.

A `wav.scp` may name commands whose output is the sound. They are never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.corpora.formats.rows import Line, Unusable, text_lines

_CHANNELS = {"A": 0, "B": 1, "1": 0, "2": 1}


def rows(folder: Path) -> Iterator[Line]:
    """A row for each line of `segments`, or of `wav.scp` where nothing is cut."""
    texts, speakers = _table(folder / "text"), _table(folder / "utt2spk")
    channels = _channels(folder / "reco2file_and_channel")
    sounds = _table(folder / "wav.scp")
    cut = (folder / "segments").is_file()
    for where, line in text_lines(folder / ("segments" if cut else "wav.scp")):
        if isinstance(line, Unusable):
            yield where, line
            continue
        name, *rest = line.split(maxsplit=3 if cut else 1)
        recording = (rest[0] if rest else "") if cut else name
        row: dict[str, Any] = {"id": name, "text": texts.get(name), "speaker": speakers.get(name, "")}
        try:
            row |= {"audio": _file(sounds.get(recording), recording), "channel": channels.get(recording)}
            row |= _span(rest) if cut else {}
        except Unusable as problem:
            yield where, problem
            continue
        yield where, row


def _table(path: Path) -> dict[str, str]:
    """The rest of each line by its first word; lines that are no text are left out."""
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for _, line in text_lines(path) if not isinstance(line, Unusable))
    return {words[0]: words[1].strip() if len(words) == 2 else "" for words in lines}


def _channels(path: Path) -> dict[str, int]:
    named = {recording: rest.split()[-1].upper() for recording, rest in _table(path).items() if rest}
    return {recording: _CHANNELS[channel] for recording, channel in named.items() if channel in _CHANNELS}


def _file(place: str | None, recording: str) -> str:
    if not place:
        raise Unusable(f"wav.scp has no sound of {recording or 'it'}")
    if place.endswith("|"):
        raise Unusable(f"the output of a command, which is not run ({place[:60]}); write it to a file first")
    if re.search(r":\d+$", place):
        raise Unusable(f"a place within an archive ({place[:60]}); copy it out first, as by wav-copy")
    return place


def _span(rest: list[str]) -> dict[str, float]:
    try:
        start, end = float(rest[1]), float(rest[2])
    except (IndexError, ValueError) as error:
        raise Unusable("not an utterance, its recording, and the seconds where it begins and ends") from error
    if end < 0:  # Kaldi's way to say: to the end
        return {"offset": start}
    if not 0 <= start < end:
        raise Unusable(f"from {start:g} to {end:g} s")
    return {"offset": start, "duration": end - start}
