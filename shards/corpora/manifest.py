"""Reads your own recordings: a file with one JSON object a line, each naming audio and saying what is spoken in it.

A line comes from anywhere: one that cannot be used is an utterance with a problem, whatever is wrong with it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from echox.stream.dialogue import ROLES
from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, clean, wrong_source

_NAME = "manifest"
_OTHER_NAMES = {"audio_filepath": "audio", "audio_file": "audio", "transcript": "text", "answer": "answer_text"}
"""What other programs call our fields."""
_TEXTS = ("audio", "text", "answer_text", "answer_audio", "split")
_FIELDS = (*_TEXTS, "id", "turns", "offset", "duration")
_LONGEST_LINE = 4 << 20
_LONGEST_S = 1e6
_LONGEST_EXTRA = 1000
"""Characters of a further field that is kept."""


class _Unusable(Exception):
    """A line that cannot become an utterance, and why."""


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances in the order of the lines; a line that is no such object is one that cannot be used."""
    if not source.is_file():
        raise wrong_source(_NAME, source, "file of JSON lines, such as recordings.jsonl")
    for number, line in enumerate(_lines(source), 1):
        if line is not None and not line.strip():
            continue
        try:
            yield _utterance(_row(line), source, request)
        except _Unusable as problem:
            where = f"line {number} of {source.name}"
            yield Utterance(id=where, task=request.task or "asr", source=_NAME, problem=str(problem))


def _lines(source: Path) -> Iterator[bytes | None]:
    """Lines without a byte order mark before the first; None for one that is too long to be read."""
    with source.open("rb") as file:
        first = True
        while line := file.readline(_LONGEST_LINE):
            whole = line.endswith(b"\n") or len(line) < _LONGEST_LINE
            rest = line
            while not whole and rest and not rest.endswith(b"\n"):
                rest = file.readline(_LONGEST_LINE)
            yield (line.removeprefix(b"\xef\xbb\xbf") if first else line) if whole else None
            first = False


def _row(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise _Unusable(f"longer than {_LONGEST_LINE >> 20} MiB")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Unusable(f"not UTF-8 at byte {error.start}; convert the file, as by iconv -f LATIN1 -t UTF-8") from error
    except RecursionError as error:
        raise _Unusable("nested too deeply") from error
    except ValueError as error:
        raise _Unusable(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _Unusable("not a JSON object")
    found: dict[str, Any] = {}
    for name, value in row.items():
        own: str = _OTHER_NAMES.get(str(name), str(name))
        meant = difflib.get_close_matches(own, set(_TEXTS) - set(row), 1, cutoff=0.8)
        if own not in _FIELDS and meant:
            raise _Unusable(f"unknown field {own}; did you mean {meant[0]}?")
        if own in found:
            raise _Unusable(f"{name} and {own} say the same thing twice")
        found[own] = value
    return found


def _utterance(row: Mapping[str, Any], source: Path, request: Request) -> Utterance:
    texts = {name: _text(row, name) for name in _TEXTS}
    audio, text = texts["audio"], texts["text"]
    answer_audio, answer_text = texts["answer_audio"], texts["answer_text"]
    if not request.task and "answer_text" in row and answer_text is None:
        raise _Unusable("answer_text is there but says nothing; leave it out of a line to transcribe, or name a --task")
    task = request.task or _task(audio, answer_audio, answer_text)
    if task == "tts" and answer_audio is None:
        # Recordings with their transcripts serve as speech to learn from.
        audio, text, answer_audio, answer_text = None, None, audio, answer_text or text
    start_s, seconds = _seconds(row, "offset"), _seconds(row, "duration")
    named = _id(row) or _derived(audio or answer_audio, start_s)
    if named is None:
        raise _Unusable("neither id nor audio")
    root = request.audio_root or source.parent
    turns = _turns(row)

    def place(path: str | None, start_s: float | None = None, seconds: float | None = None) -> Audio | None:
        return FileAudio(source.parent / path, root, start_s, seconds) if path else None

    spoken = place(audio, start_s, seconds) if audio else None
    heard = tuple(place(clean(turn.get("audio"))) if turn["role"] == "user" else None for turn in turns)
    return Utterance(
        id=named,
        task=task,
        source=source.stem,
        split=texts["split"] or "train",
        question=spoken if task != "tts" else None,
        question_text=text,
        answer=place(answer_audio, *((None, None) if audio else (start_s, seconds))) if task != "asr" else None,
        answer_text=text if task == "asr" else answer_text,
        turns=tuple({"role": str(turn["role"]), "text": clean(turn["text"]) or ""} for turn in turns),
        turn_audio=heard if request.history and task == "sqa" else (),
        extra=_extra(row),
    )


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise _Unusable(f"{name} is a {type(value).__name__}, not text")
    if value is not None and name.endswith("audio") and "\0" in value:
        raise _Unusable(f"{name} has a character that no path has")
    return clean(value)


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_S:
        raise _Unusable(f"{name} is {str(value)[:40]!r}, not a number of seconds")
    return float(value)


def _id(row: Mapping[str, Any]) -> str | None:
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, "id")


def _derived(path: str | None, start_s: float | None) -> str | None:
    if not path:
        return None
    name = PurePosixPath(path)
    stem = (name.with_suffix("") if name.name else name).as_posix()
    return stem if start_s is None else f"{stem}-{start_s:g}"


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = row.get("turns")
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise _Unusable(f"turns is a {type(turns).__name__}, not a list")
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "text"} <= set(turn):
            raise _Unusable("turns is not a list of objects with role and text")
        if turn["role"] not in ROLES:
            raise _Unusable(f"a turn's role is {str(turn['role'])[:40]!r}, not {', '.join(ROLES)}")
        for name in ("text", "audio"):
            _text(turn, name)
    return turns


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields, such as a speaker's name: kept where they are short, and never in the place of ours."""
    short: dict[str, Any] = {}
    for name, value in row.items():
        kept = clean(value) if isinstance(value, str) else value
        finite = isinstance(kept, str | bool | int) or isinstance(kept, float) and math.isfinite(kept)
        label = clean(name)
        if name not in _FIELDS and label and finite and len(str(kept)) <= _LONGEST_EXTRA:
            short[label] = kept
    return {"fields": short} if short else {}


def _task(audio: str | None, answer_audio: str | None, answer_text: str | None) -> str:
    if audio is None and answer_audio is not None:
        return "tts"
    return "asr" if answer_text is None else "sqa"


CORPUS = Corpus(
    name=_NAME,
    summary="your own recordings: JSON lines that name audio files and give their texts",
    page="yours",
    licence="yours",
    layout="""\
{"audio": "calls/001.wav", "text": "what is the capital of france"}
{"audio": "calls/002.mp3", "text": "who wrote hamlet", "answer_text": "Shakespeare wrote Hamlet."}
{"answer_audio": "voice/003.flac", "answer_text": "Paris is the capital of France."}
Paths are relative to the file, and lead to files below its folder or --audio-root. The first line is speech to
transcribe (asr), the second a question with its answer (sqa), the third an answer to learn to speak (tts); a recipe
takes of the shards what its task can use. "answer_audio" may be added to a question; "id" (else the path), "split",
"offset" and "duration" in seconds, and "turns" ({"role", "text"} of the dialogue before, with "audio" for
--history-audio) are optional; "audio_filepath" is read as "audio", and further short fields are kept as "fields". With
--task tts, "audio" and "text" are read as a spoken answer too.""",
    tasks=("", "asr", "sqa", "tts"),
    discover=discover,
    example="echox shards build manifest --source recordings.jsonl --out data/recordings",
)
