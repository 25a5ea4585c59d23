"""Reads questions and writes events as HTTP carries them: audio files and JSON in, a line of JSON an event out."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from echox.audio.io import read_audio
from echox.errors import DataError, EchoXError
from echox.serve.limits import Limits
from echox.serve.worker import Question
from echox.speak.events import Audio, Event, SegmentCut, TextToken, Units
from echox.speak.sampling import SeededSampling
from echox.stream.dialogue import parse_turns

OPTIONS = ("temperature", "top_p", "top_k", "seed", "max_tokens")
_TAKEN = (*OPTIONS, "audio", "history", "transcript")


def parse_question(body: bytes, json_body: bool, query: Mapping[str, str], limits: Limits) -> Question:
    """A question of a request's body.

    Args:
        body: an audio file; or JSON with that in base64 as `audio`, and where wanted `history` and options.
        json_body: which of them.
        query: options where the body is an audio file.
        limits: of the question.

    Raises:
        DataError: it is neither, or beyond the limits.
    """
    given: Mapping[str, Any] = _json(body) if json_body else {**query, "audio": body}
    unknown = sorted(given.keys() - set(_TAKEN))
    if unknown:
        raise DataError(f"there is no {unknown[0][:40]!r} in a question", fix=f"give some of {', '.join(_TAKEN)}")
    try:
        history = parse_turns(given.get("history"))
        numbers = {name: (int if name in ("top_k", "seed", "max_tokens") else float)(given[name])
                   for name in OPTIONS if name in given}  # fmt: skip
        tokens = numbers.pop("max_tokens", limits.tokens)
        sampling = SeededSampling(**numbers)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"the question cannot be read: {error}", fix="correct it") from error
    if not 0 < tokens <= limits.tokens:
        raise DataError(f"max_tokens is {tokens}, not from 1 to {limits.tokens}", fix="ask for fewer")
    if len(history) > limits.turns:
        raise DataError(f"there are {len(history)} turns before the question", fix=f"give up to {limits.turns}")
    audio = read_audio(_bytes(given.get("audio")), limits.question_s)
    wanted = str(given.get("transcript", "")).lower() in ("true", "1")
    return Question(audio=audio, history=history, sampling=sampling, tokens=int(tokens), transcript=wanted)


def event_line(event: Event | EchoXError) -> bytes:
    """One event as a line of JSON."""
    return json.dumps(_fields(event), ensure_ascii=False).encode() + b"\n"


def _fields(event: Event | EchoXError) -> dict[str, Any]:
    if isinstance(event, EchoXError):
        return {"event": "error", "error": event.what, "fix": event.fix}
    if isinstance(event, TextToken):
        return {"event": "text", "text": event.text, "token": event.token}
    if isinstance(event, SegmentCut):
        scores = [round(score, 4) for score in event.scores]
        return {"event": "cut", **vars(event), "scores": scores}
    if isinstance(event, Units):
        return {"event": "units", "segment": event.segment, "units": event.units.tolist(), "last": event.last}
    if isinstance(event, Audio):
        pcm = np.round(np.clip(event.samples, -1, 1) * 32767).astype("<i2").tobytes()
        return {"event": "audio", "rate": event.rate, "pcm16": base64.b64encode(pcm).decode()}
    return {"event": type(event).__name__.lower(), **vars(event)}


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the question is no JSON: {str(error)[:100]}", fix="correct it") from error
    if not isinstance(given, dict):
        raise DataError(f"the question is a {type(given).__name__}, not an object", fix="correct it")
    return given


def _bytes(audio: Any) -> bytes:
    if isinstance(audio, bytes):
        return audio
    try:
        return base64.b64decode(audio, validate=True)
    except (ValueError, TypeError, binascii.Error) as error:
        raise DataError("audio is no audio file in base64", fix="encode a WAV or FLAC file so") from error
