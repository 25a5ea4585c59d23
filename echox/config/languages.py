"""Knows the languages that a recipe may name: those of Whisper, which hears them and whose rules compare texts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from echox.config.mistakes import did_you_mean

ENGLISH = "en"
# fmt: off
LANGUAGES = frozenset((
    "af", "am", "ar", "as", "az", "ba", "be", "bg", "bn", "bo", "br", "bs", "ca", "cs", "cy", "da", "de", "el", "en",
    "es", "et", "eu", "fa", "fi", "fo", "fr", "gl", "gu", "ha", "haw", "he", "hi", "hr", "ht", "hu", "hy", "id", "is",
    "it", "ja", "jw", "ka", "kk", "km", "kn", "ko", "la", "lb", "ln", "lo", "lt", "lv", "mg", "mi", "mk", "ml", "mn",
    "mr", "ms", "mt", "my", "ne", "nl", "nn", "no", "oc", "pa", "pl", "ps", "pt", "ro", "ru", "sa", "sd", "si", "sk",
    "sl", "sn", "so", "sq", "sr", "su", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt", "uk", "ur", "uz",
    "vi", "yi", "yo", "yue", "zh",
))
# fmt: on
"""Codes of Whisper's languages, mostly ISO 639-1."""

_FULL_STOPS = {
    "。": ("zh", "yue", "ja"),
    "।": ("hi", "bn", "as", "ne", "pa", "sa"),
    "۔": ("ur",),
    "။": ("my",),
    "។": ("km",),
    "།": ("bo",),
    "።": ("am",),
    "։": ("hy",),
}


def full_stop(language: str) -> str:
    """The mark at the end of a sentence that states something; Thai and Lao, which have none, get the usual one."""
    return next((mark for mark, languages in _FULL_STOPS.items() if language in languages), ".")


def _known(value: Any) -> Any:
    """The code of a language; YAML reads that of Norwegian, no, as false.

    Raises:
        PydanticCustomError: Whisper does not know it; with a fix.
    """
    code = "no" if value is False else value
    if isinstance(code, str) and code not in LANGUAGES:
        fix = did_you_mean(code, LANGUAGES, noun="languages")
        raise PydanticCustomError("unknown_language", "the code of a language that Whisper knows", {"fix": fix})
    return code


Language = Annotated[str, BeforeValidator(_known)]
