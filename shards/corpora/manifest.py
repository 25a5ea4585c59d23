"""Reads your own recordings: a file with one JSON object a line, each naming audio and saying what is spoken in it.

A line comes from anywhere: one that cannot be used is an utterance with a problem, whatever is wrong with it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from echox.stream.dialogue import ROLES
from shards.corpora.formats.registry import MANIFEST, recognised
from shards.corpora.formats.rows import Row, Unusable
from shards.corpus import Audio, Corpus, FileAudio, ParquetAudio, Request, Utterance, clean, wrong_source

_NAME = "manifest"
_OTHER_NAMES = {"audio_filepath": "audio", "audio_file": "audio", "transcript": "text", "answer": "answer_text"}
"""What other programs call our fields."""
_SOUNDS = ("audio", "answer_audio")
_TEXTS = (*_SOUNDS, "text", "answer_text", "split")
_SPAN = ("offset", "duration", "channel")
_FIELDS = (*_TEXTS, "id", "turns", "answers", *_SPAN, *(f"answer_{name}" for name in _SPAN))
_LONGEST_S = 1e6
_LONGEST_EXTRA = 1000
"""Characters of a further field that is kept."""
_MOST_ANSWERS = 100


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances in the order of the lines; a line that is no such object is one that cannot be used."""
    found = recognised(source)
    if found is None:
        raise wrong_source(_NAME, source, "file of JSON lines, such as recordings.jsonl, or list in a format of others")
    base = source if source.is_dir() else source.parent
    places = _Places(base, request.audio_root or base, request.audio_root if found.from_root else None)
    for where, line in found.rows(source):
        try:
            if isinstance(line, Unusable):
                raise line
            row = _own(line) if found is MANIFEST else {k: v for k, v in line.items() if v is not None}
            yield _utterance(row, source, request, places)
        except Unusable as problem:
            yield Utterance(id=where, task=request.task or "asr", source=_NAME, problem=str(problem))


def _own(line: Row) -> dict[str, Any]:
    """A line of ours or NeMo's under our names, in which nothing is misspelt or said twice."""
    found: dict[str, Any] = {}
    for name, value in line.items():
        own: str = _OTHER_NAMES.get(str(name), str(name))
        meant = difflib.get_close_matches(own, set(_TEXTS) - set(line), 1, cutoff=0.8)
        if own not in _FIELDS and meant:
            raise Unusable(f"unknown field {own}; did you mean {meant[0]}?")
        if own in found:
            raise Unusable(f"{name} and {own} say the same thing twice")
        found[own] = value
    return found


@dataclass(frozen=True)
class _Places:
    """Where the sounds of a list are.

    Attributes:
        base: the list's own folder.
        root: the folder that they have to lie in.
        counted_from: what relative paths count from where it is not `base`.
    """

    base: Path
    root: Path
    counted_from: Path | None

    def sound(self, row: Mapping[str, Any], name: str, prefix: str = "") -> Audio | None:
        """The sound that a field of a row names, or that is there itself; its span has names with a prefix."""
        named = row.get(name)
        if isinstance(named, ParquetAudio):
            return named
        path = _text(row, name)
        if not path:
            return None
        start_s, seconds = _seconds(row, f"{prefix}offset"), _seconds(row, f"{prefix}duration")
        folder = self.counted_from or self.base
        return FileAudio(folder / path, self.root, start_s, seconds, _channel(row, f"{prefix}channel"))


def _utterance(row: Mapping[str, Any], source: Path, request: Request, places: _Places) -> Utterance:
    texts = {name: _text(row, name) for name in _TEXTS if name not in _SOUNDS}
    text, answer_text = texts["text"], texts["answer_text"]
    if not request.task and "answer_text" in row and answer_text is None:
        raise Unusable("answer_text is there but says nothing; leave it out of a line to transcribe, or name a --task")
    audio = places.sound(row, "audio")
    answer_audio = places.sound(row, "answer_audio", "" if audio is None else "answer_")
    task = request.task or _task(audio or text, answer_audio or answer_text, answer_text)
    if task == "tts" and answer_audio is None:
        # Recordings with their transcripts serve as speech to learn from.
        audio, text, answer_audio, answer_text = None, None, audio, answer_text or text
    named = _id(row) or _derived(row) or _by_text(text or answer_text)
    if named is None:
        raise Unusable("neither id, audio nor text")
    turns = _turns(row)
    heard = tuple(places.sound(turn, "audio") if turn["role"] == "user" else None for turn in turns)
    return Utterance(
        id=named,
        task=task,
        source=source.stem,
        split=texts["split"] or "train",
        question=audio if task != "tts" else None,
        question_text=text,
        answer=answer_audio if task != "asr" else None,
        answer_text=text if task == "asr" else answer_text,
        turns=tuple({"role": str(turn["role"]), "text": clean(turn["text"]) or ""} for turn in turns),
        turn_audio=heard if request.history and task == "sqa" else (),
        extra=_extra(row),
    )


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise Unusable(f"{name} is a {type(value).__name__}, not text")
    if value is not None and name.endswith("audio") and "\0" in value:
        raise Unusable(f"{name} has a character that no path has")
    return clean(value)


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_S:
        raise Unusable(f"{name} is {str(value)[:40]!r}, not a number of seconds")
    return float(value)


def _id(row: Mapping[str, Any]) -> str | None:
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, "id")


def _channel(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 256):
        raise Unusable(f"{name} is {str(value)[:40]!r}, not the number of a channel, from 0")
    return value


def _derived(row: Mapping[str, Any]) -> str | None:
    start_s, channel = _seconds(row, "offset"), _channel(row, "channel")
    path = next((found for name in _SOUNDS if (found := _text(row, name))), None)
    if path is None:
        return None
    name = PurePosixPath(path)
    stem = (name.with_suffix("") if name.name else name).as_posix()
    parts = [stem, *([] if start_s is None else [f"{start_s:g}"]), *([] if channel is None else [f"ch{channel}"])]
    return "-".join(parts)


def _by_text(text: str | None) -> str | None:
    return None if text is None else f"text-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = row.get("turns")
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise Unusable(f"turns is a {type(turns).__name__}, not a list")
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "text"} <= set(turn):
            raise Unusable("turns is not a list of objects with role and text")
        if turn["role"] not in ROLES:
            raise Unusable(f"a turn's role is {str(turn['role'])[:40]!r}, not {', '.join(ROLES)}")
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
    answers = _answers(row)
    return {**({"fields": short} if short else {}), **({"answers": answers} if answers else {})}


def _answers(row: Mapping[str, Any]) -> list[str]:
    """Accepted answers to a question, by which replies in other words are scored; what is no short text is left out."""
    given = row.get("answers")
    listed = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    texts = [clean(each) for each in listed[:_MOST_ANSWERS] if isinstance(each, str)]
    return [text for text in texts if text and len(text) <= _LONGEST_EXTRA]


def _task(asked: Audio | str | None, answered: Audio | str | None, answer_text: str | None) -> str:
    if asked is None and answered is not None:
        return "tts"
    return "asr" if answer_text is None else "sqa"


def _kind(source: Path) -> str:
    found = recognised(source)
    return "" if found is None or found is MANIFEST else f"read as {found.name}"


CORPUS = Corpus(
    name=_NAME,
    summary="your own recordings, listed in JSON lines or in a format of other programs",
    page="yours",
    licence="yours",
    layout="""\
{"audio": "calls/001.wav", "text": "what is the capital of france"}
{"audio": "calls/002.mp3", "text": "who wrote hamlet", "answer_text": "Shakespeare wrote Hamlet."}
{"answer_audio": "voice/003.flac", "answer_text": "Paris is the capital of France."}
Paths are relative to the file, and lead to files below its folder or --audio-root. The first line is speech to
transcribe (asr), the second a question with its answer (sqa), the third an answer to learn to speak (tts); a recipe
takes of the shards what its task can use. "answer_audio" may be added to a question; "id" (else the path), "split",
"offset" and "duration" in seconds, "channel" (from 0; otherwise the mean of all), these three with "answer_" before
them for "answer_audio", "answers" (a list of those that scores accept), and "turns" ({"role", "text"} of the dialogue
before, with "audio" for --history-audio) are optional; "audio_filepath" is read as "audio", and further short fields
are kept as "fields", of which "speaker", and "answer_speaker" beside a question, tell the voices of a vocoder apart.
With --task tts, "audio" and "text" are read as a spoken answer too.""",
    tasks=("", "asr", "sqa", "tts"),
    discover=discover,
    kind=_kind,
    example="echox shards build manifest --source recordings.jsonl --out data/recordings",
)
