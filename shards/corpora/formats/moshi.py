"""Reads the lists of moshi-finetune: stereo dialogues, the assistant on the left, and the times of its words.

What the user says has no words there, so the assistant's turns become speech to learn to speak (`tts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shards.corpora.formats.rows import Line, Row, Unusable, expanded, json_rows

_MAIN, _LEFT = "SPEAKER_MAIN", 0
_PAUSE_S = 1.0
"""Silence that ends a turn."""
_AROUND_S = 0.1
"""Kept before and after the words, whose times are tight."""
_LARGEST = 64 << 20


def is_sound(row: Row) -> bool:
    """Whether a JSON object names a dialogue and its length, and nothing that is said in it."""
    return set(row) == {"path", "duration"}


def rows(path: Path) -> Iterator[Line]:
    """A row for each turn of the assistant."""
    return expanded(json_rows(path), partial(_turns, path.parent))


def _turns(folder: Path, sound: Row) -> Iterator[dict[str, Any]]:
    name = sound["path"]
    beside = (folder / name).with_suffix(".json")
    try:
        if beside.stat().st_size > _LARGEST:
            raise Unusable(f"{beside.name} is larger than {_LARGEST >> 20} MiB")
        words = [
            (str(word), float(start), float(end))
            for word, (start, end), speaker in json.loads(beside.read_text())["alignments"]
            if speaker == _MAIN
        ]
    except OSError as error:
        raise Unusable(f"no times of its words: {beside.name} is not there") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unusable(f"{beside.name} has no alignments of words, times and speakers") from error
    if not words:
        raise Unusable(f"{beside.name} has no word of {_MAIN}")
    turn = [words[0]]
    for word in words[1:]:
        if word[1] - turn[-1][2] >= _PAUSE_S:
            yield _row(name, turn)
            turn = []
        turn.append(word)
    yield _row(name, turn)


def _row(name: str, turn: list[tuple[str, float, float]]) -> dict[str, Any]:
    start = max(0.0, turn[0][1] - _AROUND_S)
    return {
        "answer_audio": name,
        "answer_text": " ".join(word.strip() for word, _, _ in turn),
        "channel": _LEFT,
        "offset": start,
        "duration": turn[-1][2] + _AROUND_S - start,
    }
