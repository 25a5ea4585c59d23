"""Reads questions and writes events as HTTP and a WebSocket carry them: JSON, audio files, samples."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import replace
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
_TAKEN = (*OPTIONS, "history", "transcript")
_SILENCE = np.zeros(0, np.float32)


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
    given: dict[str, Any] = parse_object(body, "the question") if json_body else {**query, "audio": body}
    audio = given.pop("audio", None)
    question = parse_options(given, limits, also=("audio",))
    return replace(question, audio=read_audio(_bytes(audio), limits.question_s))


def parse_options(given: Mapping[str, Any], limits: Limits, also: tuple[str, ...] = ()) -> Question:
    """A question of its history and options, still without sound.

    Args:
        given: them by name.
        limits: of the question.
        also: what else may be given there, for the error.

    Raises:
        DataError: there is no such option, or one is beyond the limits.
    """
    unknown = sorted(given.keys() - set(_TAKEN))
    if unknown:
        raise DataError(
            f"there is no {unknown[0][:40]!r} in a question", fix=f"give some of {', '.join((*_TAKEN, *also))}"
        )
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
    wanted = str(given.get("transcript", "")).lower() in ("true", "1")
    return Question(audio=_SILENCE, history=history, sampling=sampling, tokens=int(tokens), transcript=wanted)


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The object that a text in JSON is.

    Args:
        text: JSON.
        what: what it is to be, for the error.

    Raises:
        DataError: it is no JSON, or no object.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is no JSON: {str(error)[:100]}", fix="correct it") from error
    if not isinstance(given, dict):
        raise DataError(f"{what} is a {type(given).__name__}, not an object", fix="correct it")
    return given


def event_line(event: Event | EchoXError) -> bytes:
    """One event as a line of JSON, samples in base64."""
    fields = _fields(event)
    if isinstance(event, Audio):
        fields["pcm16"] = base64.b64encode(_pcm16(event)).decode()
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def event_message(event: Event | EchoXError) -> tuple[str, bytes]:
    """One event as JSON, and the samples that follow it; none but after `audio`."""
    fields, pcm16 = _fields(event), b""
    if isinstance(event, Audio):
        pcm16 = _pcm16(event)
        fields["bytes"] = len(pcm16)
    return json.dumps(fields, ensure_ascii=False), pcm16


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
        return {"event": "audio", "rate": event.rate}
    return {"event": type(event).__name__.lower(), **vars(event)}


def _pcm16(event: Audio) -> bytes:
    return np.round(np.clip(event.samples, -1, 1) * 32767).astype("<i2").tobytes()


def _bytes(audio: Any) -> bytes:
    if isinstance(audio, bytes):
        return audio
    try:
        return base64.b64decode(audio, validate=True)
    except (ValueError, TypeError, binascii.Error) as error:
        raise DataError("audio is no audio file in base64", fix="encode a WAV or FLAC file so") from error
