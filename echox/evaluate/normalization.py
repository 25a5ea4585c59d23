"""Normalises texts by their language, so that two that sound the same compare as equal; after Whisper's rules."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from echox.config.languages import ENGLISH

SPACELESS = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages written without spaces between words, whose texts are compared character by character.

Those of the Whisper paper are Chinese, Japanese, Thai, Lao and Burmese; Cantonese and Khmer are written likewise.
"""
_VOWEL_SIGNS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670]")
"""Points of Hebrew and Arabic, and the tatweel: aids to reading, which most texts go without."""
_STRESS = re.compile("(?<=[\u0400-\u04ff])[\u0300\u0301]")
"""Accents on Cyrillic vowels, as dictionaries have them."""
_DOTLESS = str.maketrans({"I": "ı", "İ": "i"})
"""Capitals of Turkish and Azerbaijani, which have an i with a dot and one without."""


@functools.cache
def _normalizer(language: str) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language == ENGLISH:
        # Its spelling table (colour to color) is data of a model's folder; both sides of a comparison go without.
        return EnglishTextNormalizer({})
    basic: Any = BasicTextNormalizer(split_letters=language in SPACELESS)
    basic.clean = _by_yo if language == "ru" else _without_symbols
    normalizer: Callable[[str], str] = basic
    return normalizer


def normalize(text: str, language: str = ENGLISH) -> str:
    """A text by Whisper's normalisation (arXiv 2212.04356, appendix C), as in transformers.

    English: case, punctuation, contractions, numbers as digits, fillers removed. Other languages: compatibility forms,
    case, punctuation and symbols, brackets with what is in them; numbers stay as they are written. There Whisper's
    rules put a space in the place of every combining mark, which takes the vowels out of Hindi or Thai: marks are kept
    here, but for the vowel signs of Arabic and Hebrew and stress on Cyrillic, which are written or not. Russian ё is е.

    Args:
        text: of any kind.
        language: Whisper's code. Texts of `SPACELESS` ones come as characters with spaces between them.
    """
    if language in ("tr", "az"):
        text = text.translate(_DOTLESS)
    # The English rules leave a full stop standing where no word is before it.
    words = _normalizer(language)(text).split()
    return " ".join(word for word in words if any(character.isalnum() for character in word))


def error_rate_name(language: str) -> str:
    """What `wer` is in a language: `WER`, or `CER` where characters are compared."""
    return "CER" if language in SPACELESS else "WER"


def _without_symbols(text: str) -> str:
    """As Whisper's `remove_symbols`, with combining marks left in."""
    composed = unicodedata.normalize("NFKC", _STRESS.sub("", _VOWEL_SIGNS.sub("", unicodedata.normalize("NFKC", text))))
    return "".join(" " if unicodedata.category(each)[0] in "SP" else each for each in composed)


def _by_yo(text: str) -> str:
    return _without_symbols(text).replace("ё", "е")
