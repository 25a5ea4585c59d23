"""Keeps what an answer in progress has written, cut and said, and makes its events of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from echox.errors import DataError
from echox.models.trigger import Cutter
from echox.speak.events import Audio, Done, Event, Failed, SegmentCut, TextToken, Units
from echox.speak.incremental_text import IncrementalText

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from echox.speak.vocoder import Vocoder

Why = Literal["end", "limit", "cancelled"]

SOUND_UNITS = 4
"""Units that the vocoder is given at a time, so that what is known of them is heard before the others are computed."""


@dataclass
class Segment:
    """A segment that was cut.

    Attributes:
        number: from 0.
        tokens_T, hidden_Th: its text tokens and their states.
        waiting: units that wait for earlier segments to end.
        over: whether it has said all it says.
        failure: why it failed; empty where it did not.
    """

    number: int
    tokens_T: Tensor
    hidden_Th: Tensor
    waiting: list[NDArray[np.uint16]] = field(default_factory=list)
    over: bool = False
    failure: str = ""


@dataclass(frozen=True)
class _Sound:
    """Units of a segment that are still to be made sound."""

    units: NDArray[np.uint16]


@dataclass(frozen=True)
class _Over:
    """The end of a segment, which failed where `failure` or the vocoder says why."""

    segment: int
    failure: str


@dataclass(frozen=True)
class _End:
    """The end of the answer."""

    text: str
    why: Why
    tokens: int
    segments: int


class Answer:
    """One answer in progress.

    Args:
        text: of its tokens.
        cutter: says where its segments end.
        vocoder: None for units alone.
        asked: whether it is cancelled, asked before every step.

    Attributes:
        cancelled: set it, from any thread, and the answer ends before the next step.
        finished: whether `Done` is among the events that were given or can be taken.
    """

    def __init__(
        self,
        text: IncrementalText,
        cutter: Cutter,
        vocoder: Vocoder | None,
        asked: Callable[[], bool] | None = None,
    ) -> None:
        self.cancelled = self.finished = False
        self._asked = asked
        self._text, self._cutter = text, cutter
        self._rate = 0 if vocoder is None else vocoder.sample_rate
        self._voice = None if vocoder is None else vocoder.stream()
        self._events: deque[Event | _Sound | _Over | _End] = deque()
        self._states: list[Tensor] = []
        self._scores: list[float] = []
        self._start = 0
        self._segments: list[Segment] = []
        self._spoken = self._failed = 0
        self._written_as: Why | None = None
        self._unheard = ""

    def goes_on(self) -> bool:
        """Whether there is another step; one that was cancelled ends here."""
        if not self.finished and self._is_cancelled():
            self._end("cancelled")
        return not self.finished

    def take(self) -> Iterator[Event]:
        """The events since one last asked; sound is made while they are taken, a step a few units."""
        while self._events:
            match self._events.popleft():
                case _Sound(units):
                    yield from self._sound(units)
                case _Over(segment, failure):
                    failure, self._unheard = failure or self._unheard, ""
                    if failure:
                        self._failed += 1
                        yield Failed(segment, failure)
                case _End() as end:
                    yield from self._last(end)
                case event:
                    yield event

    def write(self, token: int) -> None:
        """It wrote a token that is not its end."""
        self._events.append(TextToken(token, self._text.push(token)))

    def know_state(self, state_h: Tensor, score: float) -> Segment | None:
        """The state and the trigger score of its next token; the segment that is now known to have ended, if any."""
        self._states.append(state_h)
        self._scores.append(score)
        end = self._cutter.push(score)
        return None if end is None else self._cut(end)

    def end_text(self, why: Why) -> Segment | None:
        """It writes no more; what is left is a segment."""
        self._written_as = why
        rest = self._text.close()
        if rest:
            self._events.append(TextToken(self._text.tokens[-1], rest))
        return self._cut(len(self._states)) if self._start < len(self._states) else None

    def say(self, segment: Segment, units: NDArray[np.uint16], over: bool, failure: str) -> None:
        """A segment said some units, see `Spoken`."""
        segment.waiting.append(units)
        segment.over, segment.failure = over, failure
        self._speak()

    def finish(self) -> None:
        """Give the end of the sound and `Done`, where all is written and said."""
        if not self.finished and self._written_as is not None and self._spoken == len(self._segments):
            self._end(self._written_as)

    def _cut(self, end: int) -> Segment:
        first, self._start = self._start, end
        tokens_T = torch.tensor(self._text.tokens[first:end])
        segment = Segment(len(self._segments), tokens_T, torch.stack(self._states[first:end]))
        self._segments.append(segment)
        said = self._text.of(first, end)
        self._events.append(SegmentCut(segment.number, first, end, said, tuple(self._scores[first:end])))
        return segment

    def _speak(self) -> None:
        """Give the units whose turn it is: a segment's come after all of those before."""
        while self._spoken < len(self._segments):
            segment = self._segments[self._spoken]
            if not segment.waiting:
                return
            units = np.concatenate(segment.waiting)
            segment.waiting.clear()
            if len(units) or segment.over:
                self._events.append(Units(segment.number, units, segment.over))
            self._events.append(_Sound(units))
            if not segment.over:
                return
            self._events.append(_Over(segment.number, segment.failure))
            self._spoken += 1

    def _end(self, why: Why) -> None:
        self.finished = True
        self._events.append(_End(self._text.text, why, len(self._text.tokens), len(self._segments)))
        self._states.clear()
        self._segments.clear()

    def _is_cancelled(self) -> bool:
        self.cancelled = self.cancelled or (self._asked is not None and self._asked())
        return self.cancelled

    def _sound(self, units: NDArray[np.uint16]) -> Iterator[Audio]:
        """What is known of the sound after more units; nothing once the answer is cancelled."""
        if self._voice is None:
            return
        try:
            for start in range(0, len(units), SOUND_UNITS):
                if self._is_cancelled():
                    return
                yield from self._heard(self._voice.push(units[start : start + SOUND_UNITS]))
        except DataError as error:
            self._unheard = error.what

    def _last(self, end: _End) -> Iterator[Event]:
        if self._voice is not None and not self._is_cancelled():
            yield from self._heard(self._voice.close())
        why: Why = "cancelled" if self.cancelled else end.why
        yield Done(end.text, why, end.tokens, end.segments, self._failed)

    def _heard(self, samples: NDArray[np.float32]) -> Iterator[Audio]:
        if len(samples):
            yield Audio(samples, self._rate)
