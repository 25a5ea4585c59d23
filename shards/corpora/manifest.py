"""Reads your own recordings: a file with one JSON object a line, each naming audio and saying what is spoken in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, clean, wrong_source

_NAME = "manifest"
_FIELDS = ("audio", "text", "answer_text", "answer_audio", "id", "split", "turns")


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances in the order of the lines; a line that is no such object is one that cannot be used."""
    if not source.is_file():
        raise wrong_source(_NAME, source, "file of JSON lines, such as recordings.jsonl")
    with source.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _utterance(line, number, source, request)


def _utterance(line: str, number: int, source: Path, request: Request) -> Utterance:
    where = f"line {number} of {source.name}"
    try:
        row = json.loads(line)
    except ValueError as error:
        return _unusable(where, request, f"not JSON: {error}")
    if not isinstance(row, Mapping):
        return _unusable(where, request, "not a JSON object")
    if unknown := sorted(set(row) - set(_FIELDS)):
        return _unusable(where, request, f"unknown field {unknown[0]}; the fields are {', '.join(_FIELDS)}")
    audio, text = clean(row.get("audio")), clean(row.get("text"))
    answer_audio, answer_text = clean(row.get("answer_audio")), clean(row.get("answer_text"))
    task = request.task or _task(audio, answer_audio, answer_text)
    if task == "tts" and answer_audio is None:
        # Recordings with their transcripts serve as speech to learn from.
        audio, text, answer_audio, answer_text = None, None, audio, answer_text or text
    named = clean(row.get("id")) or _name(audio or answer_audio)
    if named is None:
        return _unusable(where, request, "neither id nor audio")
    turns = row.get("turns") or ()
    if not all(isinstance(turn, Mapping) and {"role", "text"} <= set(turn) for turn in turns):
        return _unusable(where, request, "turns is not a list of objects with role and text")
    return Utterance(
        id=named,
        task=task,
        source=source.stem,
        split=clean(row.get("split")) or "train",
        question=_place(source, audio) if task != "tts" else None,
        question_text=text,
        answer=_place(source, answer_audio) if task != "asr" else None,
        answer_text=text if task == "asr" else answer_text,
        turns=tuple({"role": str(turn["role"]), "text": clean(turn["text"]) or ""} for turn in turns),
        turn_audio=_heard(source, turns) if request.history and task == "sqa" else (),
    )


def _heard(source: Path, turns: Iterable[Mapping[str, Any]]) -> tuple[Audio | None, ...]:
    return tuple(_place(source, clean(turn.get("audio"))) if turn["role"] == "user" else None for turn in turns)


def _task(audio: str | None, answer_audio: str | None, answer_text: str | None) -> str:
    if audio is None and answer_audio is not None:
        return "tts"
    return "asr" if answer_text is None else "sqa"


def _unusable(where: str, request: Request, problem: str) -> Utterance:
    return Utterance(id=where, task=request.task or "asr", source=_NAME, problem=problem)


def _name(path: str | None) -> str | None:
    return PurePosixPath(path).with_suffix("").as_posix() if path else None


def _place(source: Path, path: Any) -> Audio | None:
    return FileAudio(source.parent / path) if path else None


CORPUS = Corpus(
    name=_NAME,
    summary="your own recordings: JSON lines that name audio files and give their texts",
    page="yours",
    licence="yours",
    layout="""\
{"audio": "calls/001.wav", "text": "what is the capital of france"}
{"audio": "calls/002.mp3", "text": "who wrote hamlet", "answer_text": "Shakespeare wrote Hamlet."}
{"answer_audio": "voice/003.flac", "answer_text": "Paris is the capital of France."}
Paths are relative to the file. The first line is speech to transcribe (asr), the second a question with its answer
(sqa), the third an answer to learn to speak (tts). "answer_audio" may be added to a question; "id" (else the path),
"split" and "turns" ({"role", "text"} of the dialogue before, with "audio" for --history-audio) are optional. With
--task tts, "audio" and "text" are read as a spoken answer too.""",
    tasks=("", "asr", "sqa", "tts"),
    discover=discover,
    example="echox shards build manifest --source recordings.jsonl --out data/recordings",
)
