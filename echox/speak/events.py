"""What comes out of an answer in progress, in the order in which it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextToken:
    """The model wrote a token.

    Attributes:
        token: its id.
        text: what it adds to the text; empty while a character or a space may still change.
    """

    token: int
    text: str


@dataclass(frozen=True)
class SegmentCut:
    """A segment ended: its tokens are to be spoken together.

    Attributes:
        segment: its number, from 0.
        first, last: its tokens, `last` not among them.
        text: what they say.
        scores: trigger score of each of them.
    """

    segment: int
    first: int
    last: int
    text: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Units:
    """Speech units of a segment, those since the last such event; segments come in their order.

    Attributes:
        segment: its number.
        units: uint16.
        last: whether the segment has no others.
    """

    segment: int
    units: NDArray[np.uint16]
    last: bool


@dataclass(frozen=True)
class Audio:
    """Samples that follow those before.

    Attributes:
        samples: float32, mono.
        rate: samples a second.
    """

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Failed:
    """A segment could not be spoken, or not to its end; what it said up to then was given, and the answer goes on.

    Attributes:
        segment: its number.
        why: in a sentence without an end.
    """

    segment: int
    why: str


@dataclass(frozen=True)
class Done:
    """Nothing comes after this.

    Attributes:
        text: the whole of it.
        why: `end`: the model ended its answer; `limit`: it had as many tokens as it may; `cancelled`.
        tokens, segments: how many.
        failed: how many of the segments.
    """

    text: str
    why: Literal["end", "limit", "cancelled"]
    tokens: int
    segments: int
    failed: int


@dataclass(frozen=True)
class Transcript:
    """What the model heard of the question, where that is asked for; it comes before `Done`.

    Attributes:
        text: of the question.
    """

    text: str


Event = TextToken | SegmentCut | Units | Audio | Failed | Transcript | Done
