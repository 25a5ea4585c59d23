"""Keeps control tokens out of texts of the data: templates begin and end turns, and nothing else does."""

from __future__ import annotations

import re
from typing import Any

_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
"""What control tokens look like that a tokenizer does not call special, such as `<think>`."""


class PlainText:
    """Writes control tokens that a text spells out in another way: with a space after their first character.

    A tokenizer takes `<|im_end|>` in a transcript for the end of the turn. `< |im_end|>` is what it seems to be.

    Args:
        tokenizer: whose added tokens are meant, those that it calls special and those that look like it.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content) > 1]
        spelled = {
            token.content
            for token in added
            if (token.special and not token.content.isspace()) or _MARKUP.fullmatch(token.content)
        }
        longest_first = sorted(spelled, key=lambda content: (-len(content), content))
        self._control = re.compile("|".join(map(re.escape, longest_first))) if spelled else None

    def __call__(self, text: str) -> str:
        """The text; itself where it spells out no control token."""
        if self._control is None:
            return text
        while self._control.search(text):
            text = self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text
