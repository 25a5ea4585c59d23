"""Keeps what an answer in progress has written, cut and said, and makes its events of it."""

from __future__ import annotations

from collections import deque
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


class Answer:
    """One answer in progress.

    Args:
        text: of its tokens.
        cutter: says where its segments end.
        vocoder: None for units alone.

    Attributes:
        cancelled: set it, from any thread, and the answer ends before the next step.
        finished: whether `Done` was given.
    """

    def __init__(self, text: IncrementalText, cutter: Cutter, vocoder: Vocoder | None) -> None:
        self.cancelled = self.finished = False
        self._text, self._cutter = text, cutter
        self._rate = 0 if vocoder is None else vocoder.sample_rate
        self._voice = None if vocoder is None else vocoder.stream()
        self._events: deque[Event] = deque()
        self._states: list[Tensor] = []
        self._scores: list[float] = []
        self._start = 0
        self._segments: list[Segment] = []
        self._spoken = self._failed = 0
        self._written_as: Why | None = None
        self._unheard = ""

    def take(self) -> list[Event]:
        """The events since one last asked."""
        events = list(self._events)
        self._events.clear()
        return events

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
        if self.finished or self._written_as is None or self._spoken < len(self._segments):
            return
        if self._voice is not None:
            self._hear(self._voice.close())
        self._done(self._written_as)

    def cancel(self) -> None:
        """End it here."""
        if not self.finished:
            self._done("cancelled")

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
            if self._voice is not None:
                try:
                    self._hear(self._voice.push(units))
                except DataError as error:
                    self._unheard = error.what
            if not segment.over:
                return
            failure = segment.failure or self._unheard
            if failure:
                self._failed += 1
                self._events.append(Failed(segment.number, failure))
            self._spoken, self._unheard = self._spoken + 1, ""

    def _hear(self, samples: NDArray[np.float32]) -> None:
        if len(samples):
            self._events.append(Audio(samples, self._rate))

    def _done(self, why: Why) -> None:
        self.finished = True
        counts = len(self._text.tokens), len(self._segments), self._failed
        self._events.append(Done(self._text.text, why, *counts))
        self._states.clear()
        self._segments.clear()
