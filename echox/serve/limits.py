"""What a server takes of one question, and of how many at a time."""

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
    """

    question_s: float = 30.0
    body_bytes: int = 16 << 20
    turns: int = 64
    tokens: int = 512
    open: int = 4
    waiting: int = 16

    def __post_init__(self) -> None:
        wrong = [f"{name} is {value}, not above 0" for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ValueError("; ".join(wrong))
