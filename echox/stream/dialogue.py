"""Reads the dialogue before a question, `turns` of a sample, and keeps its newest turns within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from echox.audio.io import SAMPLE_RATE, read_audio
from echox.errors import CorruptSampleError, DataError
from echox.stream.format.scan import audio_seconds
from echox.stream.storage.store import Sample

ROLES = ("system", "user", "assistant")
VECTORS_PER_S = 25
"""Speech vectors of a second at most: what a spoken turn counts in tokens."""


@dataclass(frozen=True)
class Turn:
    """One turn before the question.

    Attributes:
        role: one of `ROLES`.
        text: what was said.
        audio: name of the sound of a user turn, a member of the sample (`TURN_MEMBERS`); None where there is none.
        clip: that sound, 16 kHz mono, once it was decoded.
    """

    role: str
    text: str
    audio: str | None = None
    clip: np.ndarray | None = None


class RenderedTurns(NamedTuple):
    """The prompt of a question that has turns before it.

    Attributes:
        before: text before the first spoken turn, between it and the next one, and so on, up to the question's audio.
        after: text between the question's audio and the response.
    """

    before: list[str]
    after: str


@dataclass(frozen=True)
class History:
    """How the dialogue before a question enters its prompt.

    Attributes:
        render: turns to text; a turn with a clip is a gap for its speech vectors. Raises `EchoXError` for turns that
            the chat template refuses.
        tokenize: a rendered text to token ids, with the special tokens of the template.
        tokens: most tokens of the turns' texts and sounds; the oldest turns give way, see `newest`.
        spoken: user turns that have audio are heard, not read.
    """

    render: Callable[[Sequence[Turn]], RenderedTurns]
    tokenize: Callable[[str], list[int]]
    tokens: int
    spoken: bool = False


def parse_turns(value: Any) -> list[Turn]:
    """Turns of a list of objects with `role` and `text`, and `audio` where a user turn has sound; none for None.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"turns is a {type(value).__name__}, not a list")
    return [_parsed(turn, f"turns[{number}]") for number, turn in enumerate(value)]


def _parsed(turn: Any, name: str) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if not isinstance(turn, Mapping):
        raise ValueError(f"{name} is a {type(turn).__name__}, not an object")
    role, text, audio = turn.get("role"), turn.get("text"), turn.get("audio")
    if role not in ROLES:
        raise ValueError(f"{name}.role is {role!r}, not {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if not isinstance(text, str):
        raise ValueError(f"{name}.text is a {type(text).__name__}, not text")
    if audio is not None and not isinstance(audio, str):
        raise ValueError(f"{name}.audio is a {type(audio).__name__}, not a name")
    return Turn(role, text, audio if role == "user" else None)


def turns_of(sample: Sample) -> list[Turn]:
    """The dialogue before the question of a sample.

    Raises:
        CorruptSampleError: `turns` is no list of turns (kind "schema").
    """
    try:
        return parse_turns(sample.meta.get("turns"))
    except ValueError as error:
        raise CorruptSampleError(f"sample {sample.key}: {error}", kind="schema", fix="build the shard again") from error


def heard_turns(sample: Sample) -> list[Turn]:
    """The same with the sounds that the sample was read with.

    Raises:
        CorruptSampleError: see `turns_of`; or a sound that cannot be decoded (kind "decode").
    """
    turns = turns_of(sample)
    return [hear(sample, turn) if turn.audio in sample.members else turn for turn in turns]


def hear(sample: Sample, turn: Turn) -> Turn:
    """A spoken turn with its sound.

    Raises:
        CorruptSampleError: the sample lacks the member (kind "member"), or it cannot be decoded (kind "decode").
    """
    assert turn.audio is not None
    data = sample[turn.audio]
    try:
        return replace(turn, clip=read_audio(data))
    except DataError as error:
        raise CorruptSampleError(
            f"sample {sample.key}: {turn.audio} cannot be decoded: {error.what}",
            kind="decode",
            fix="build the shard again",
        ) from error


def spoken_tokens(sample: Sample, turn: Turn, most_samples: int) -> int:
    """What a spoken turn counts in tokens, by the header of its sound, of which `most_samples` at most are heard."""
    assert turn.audio is not None
    return vectors(min(audio_seconds(sample[turn.audio]), most_samples / SAMPLE_RATE))


def vectors(seconds: float) -> int:
    """Speech vectors of so much audio at most."""
    return int(np.ceil(seconds * VECTORS_PER_S))


def newest(turns: Sequence[Turn], budget: int, cost: Callable[[Turn], int]) -> list[Turn]:
    """The newest turns that cost no more than `budget` together; the others are dropped whole, oldest first.

    A system turn at the beginning holds for all that follows, and stays as long as it fits by itself. The answer to a
    turn that was dropped goes too.

    Args:
        turns: in their order.
        budget: tokens.
        cost: tokens of a turn.
    """
    system = list(turns[:1]) if turns and turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    left = budget - sum(map(cost, system))
    if left < 0:
        system, left = [], budget
    start = len(rest)
    while start and (need := cost(rest[start - 1])) <= left:
        start, left = start - 1, left - need
    while 0 < start < len(rest) and rest[start].role == "assistant":
        start += 1
    return [*system, *rest[start:]]
