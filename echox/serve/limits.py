"""What a server takes of one question, of one connection, and of how many at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server.

    Attributes:
        question_s: longest question, seconds.
        body_bytes: largest request.
        turns: most turns before a question.
        tokens: most text tokens of an answer.
        open: answers in progress at a time.
        waiting: questions that wait for one of them to end; more are refused.
        conversations: WebSockets that are open at a time.
        message_bytes: largest message of one; a second of sound has 32,000.
        messages_s: most messages of one a second.
        idle_s: how long one may say nothing while nothing is answered, or take none of its answer, seconds.
    """

    question_s: float = 30.0
    body_bytes: int = 16 << 20
    turns: int = 64
    tokens: int = 512
    open: int = 4
    waiting: int = 16
    conversations: int = 64
    message_bytes: int = 256 << 10
    messages_s: int = 500
    idle_s: float = 60.0

    def __post_init__(self) -> None:
        wrong = [f"{name} is {value}, not above 0" for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ValueError("; ".join(wrong))
