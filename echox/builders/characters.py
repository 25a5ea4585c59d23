"""Counts the characters of each token of a vocabulary, also of tokens that are a part of a character's bytes."""

from __future__ import annotations

import re
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_characters(tokenizer: Any) -> list[int]:
    """Characters that begin in each token, so that the tokens of a text have as many as the text.

    A letter of Cyrillic, Thai or Chinese may be several tokens of a byte each: the first counts 1, the others 0.

    Args:
        tokenizer: of an LLM.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def count(token: int) -> int:
        text = str(tokenizer.decode([token]))
        if _BROKEN not in text:
            return len(text)
        spelled = str(tokenizer.convert_ids_to_tokens(token))
        fallback = _BYTE.fullmatch(spelled)
        if fallback is not None:  # as SentencePiece writes a byte
            return int(_begins(int(fallback[1], 16)))
        if not all(letter in byte_of for letter in spelled):
            return len(text)
        return sum(_begins(byte_of[letter]) for letter in spelled)

    return [count(token) for token in range(len(tokenizer))]


def _begins(byte: int) -> bool:
    """Whether a byte begins a character of UTF-8."""
    return byte & 0b1100_0000 != 0b1000_0000
