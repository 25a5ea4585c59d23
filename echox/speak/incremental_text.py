"""Turns tokens into text while they come: the pieces together are the text of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class IncrementalText:
    """Text of a growing row of tokens, without the spaces at its ends.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.tokens: list[int] = []
        self._given = ""

    @property
    def text(self) -> str:
        """All of it."""
        return self._decode(self.tokens).strip()

    def of(self, first: int, last: int) -> str:
        """Text of some of the tokens."""
        return self._decode(self.tokens[first:last]).strip()

    def push(self, token: int) -> str:
        """What a token adds; nothing while it ends in a space, or within a character of several bytes."""
        self.tokens.append(token)
        text = self._decode(self.tokens).strip()
        return "" if text.endswith(_BROKEN) else self._new(text)

    def close(self) -> str:
        """What was held back."""
        return self._new(self.text)

    def _new(self, text: str) -> str:
        # A tokenizer that tidies up what was given already cannot take it back; `text` has it right.
        if not text.startswith(self._given):
            return ""
        new, self._given = text[len(self._given) :], text
        return new
