"""Cuts a response into segments while it is written, token by token, where training cuts the whole of it."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from echox.models.echo import TriggerRule


class Cutter(Protocol):
    """Says where segments end, as soon as it can be known."""

    def push(self, score: float) -> int | None:
        """The end of a segment, counted in tokens from the beginning of the response, or None.

        Args:
            score: trigger score of the next token.
        """
        ...


class StreamingTrigger:
    """Decides as `trigger_segments` does on the whole response: a peak is known `look_ahead` tokens after it.

    Args:
        rule: when a peak ends a segment.
    """

    def __init__(self, rule: TriggerRule) -> None:
        self._rule = rule
        self._seen: deque[float] = deque(maxlen=2 * rule.look_ahead + 1)
        self._tokens, self._start = 0, 0

    def push(self, score: float) -> int | None:
        """See `Cutter`; at most one segment ends with each token."""
        self._seen.append(score)
        self._tokens += 1
        place = self._tokens - 1 - self._rule.look_ahead
        waited = place - self._start
        if waited < min(self._rule.min_tokens, self._rule.max_wait):
            return None
        judged = self._seen[-1 - self._rule.look_ahead]
        high = waited >= self._rule.min_tokens and judged > self._rule.threshold
        if judged < max(self._seen) or not (high or waited >= self._rule.max_wait):
            return None
        self._start = place + 1
        return self._start


class FixedCutter:
    """Ends a segment after every `tokens` tokens, or never.

    Args:
        tokens: of a segment; None for one segment.
    """

    def __init__(self, tokens: int | None) -> None:
        self._tokens, self._seen = tokens, 0

    def push(self, score: float) -> int | None:
        """See `Cutter`."""
        self._seen += 1
        return self._seen if self._tokens is not None and self._seen % self._tokens == 0 else None
