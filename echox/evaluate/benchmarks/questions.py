"""Defines a spoken question with its accepted answers, and what its fields may be, whoever wrote them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echox.audio.io import read_audio
from echox.errors import DataError
from echox.evaluate.text import answer_match

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST_SOUND = 256 << 20
"""Bytes of one question's audio file."""
LONGEST_S = 600.0
"""No question is longer, seconds."""
_MOST_TEXT = 100_000
_MOST_GOLDS = 10_000


@dataclass(frozen=True)
class Question:
    """One question as a benchmark stores it.

    Attributes:
        number: its place in the benchmark, from 0.
        id: its name there.
        text: what is asked, for people; empty where that is not known.
        golds: accepted answers, at least one, each with a letter, a digit or another visible character.
        sound: the audio file's bytes.
        where: file and row, for errors.
    """

    number: int
    id: str
    text: str
    golds: tuple[str, ...]
    sound: bytes
    where: str

    def audio(self) -> NDArray[np.float32]:
        """The question, 16 kHz mono.

        Raises:
            DataError: it cannot be decoded, is empty, or too long.
        """
        try:
            return read_audio(self.sound, LONGEST_S)
        except DataError as error:
            what = error.what.replace(f"{len(self.sound)} bytes of audio", f"question {self.id}")
            raise DataError(what, where=self.where, fix="copy the benchmark again, or leave the question out") from None

    def digest(self) -> bytes:
        """A hash of all that decides how it is answered and judged."""
        known = json.dumps([self.id, self.text, *self.golds]).encode()
        return hashlib.sha256(known + hashlib.sha256(self.sound).digest()).digest()


def checked_golds(value: Any, where: str) -> tuple[str, ...]:
    """Accepted answers: a text, or a list of texts; those that no answer could match are left out.

    Raises:
        DataError: something else, or none is left.
    """
    given = [value] if isinstance(value, str) else value
    fix = "give a text, or a list of texts"
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise DataError(f"the accepted answers are {_shown(value)}", where=where, fix=fix)
    if len(given) > _MOST_GOLDS or any(len(each) > _MOST_TEXT for each in given):
        raise DataError("the accepted answers are too many or too long", where=where, fix=fix)
    golds = tuple(_encodable(each) for each in given if answer_match(each, each))
    if not golds:
        raise DataError("there is no accepted answer", where=where, fix=fix)
    return golds


def checked_text(value: Any, what: str, where: str) -> str:
    """A text of bounded length; empty for None.

    Raises:
        DataError: something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise DataError(f"{what} is {_shown(value)}", where=where, fix=f"give a text of at most {_MOST_TEXT:,} letters")
    return _encodable(value.strip())


def checked_id(value: Any, number: int, where: str) -> str:
    """A question's name: a text or a whole number; its place, from 1, where none is given.

    Raises:
        DataError: something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return checked_text(value, "id", where) or str(number + 1)


def _encodable(text: str) -> str:
    """JSON may hold half a character, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _shown(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:40]!r})"
