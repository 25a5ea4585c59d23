"""Reads units out of the released models' unit tokens, whose words may be pieces that mean units only together.

A token is `<|unit_BODY|>`. A body is a unit, or a piece of text such as `▁837_81_194`: `▁` starts a word, `_` separates
units, and a piece may end inside a number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.errors import DataError
from echox.units.identity import UnitSetIdentity
from echox.units.language import MOST_UNITS, VERSION, UnitLanguage

if TYPE_CHECKING:
    from numpy.typing import NDArray

RELEASED_UNITS = 1000
"""Units of the released models; a larger number in a token is none."""
WORD_START = "▁"
_NUMBER = re.compile(r"[0-9]+")
_LONGEST_BODY = 256


class PieceLanguage(UnitLanguage):
    """The unit tokens of a release in their order: it decodes; no probabilities came with it to encode by.

    Args:
        bodies: of each token.
        n_units: numbers from here on are no units.
        unit_set: which units; None where it is not known.
    """

    def __init__(
        self, bodies: Sequence[str], n_units: int = RELEASED_UNITS, unit_set: UnitSetIdentity | None = None
    ) -> None:
        self.bodies = list(bodies)
        self.n_units = n_units
        self.unit_set = unit_set
        self._starts = any(WORD_START in body for body in self.bodies)
        self.words = [tuple(self._units([body])) for body in self.bodies]
        self.order = 1
        self.max_word = max(map(len, self.words), default=1)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all that decides which units a token has."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @property
    def separable(self) -> bool:
        """Whether each token has its units by itself: none begins in the middle of a number."""
        return not self._starts or not any(body[:1].isdigit() for body in self.bodies)

    def encode_batch(self, sequences: Sequence[Sequence[int] | NDArray[Any]]) -> list[NDArray[np.int64]]:
        """Raise DataError: there is no telling how the release cuts units into words."""
        raise DataError(
            "units cannot be cut into the words of a release, which brings no probabilities of them",
            fix="train on the model's own answers (model.echo.labels=teacher), which needs no units of recordings",
        )

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> list[int]:
        """Units of a segment's token numbers, read as the released code reads their text.

        Raises:
            DataError: a number outside 0 .. size - 1.
        """
        numbers = np.asarray(ids, dtype=np.int64).tolist()
        for index in numbers:
            if not 0 <= index < self.size:
                raise DataError(f"Unit word {index} is outside 0 to {self.size - 1}")
        return self._units([self.bodies[index] for index in numbers])

    def _units(self, bodies: Sequence[str]) -> list[int]:
        joined = any(WORD_START in body for body in bodies)
        texts = ["".join(bodies)] if joined else bodies
        found = [int(digits) for text in texts for digits in _NUMBER.findall(text) if len(digits) < 10]
        return [unit for unit in found if unit < self.n_units]

    def token(self, index: int) -> str:
        """The token as the release's tokenizer has it."""
        return f"<|unit_{self.bodies[index]}|>"

    def _content(self) -> dict[str, Any]:
        return {"n_units": self.n_units, "bodies": self.bodies}

    def save(self, path: str | Path) -> None:
        """Write one JSON file, which `UnitLanguage.load` reads."""
        content = {"version": VERSION, **self._content()}
        if self.unit_set is not None:
            content["unit_set"] = asdict(self.unit_set)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> PieceLanguage:
        """What `save` wrote.

        Raises:
            ValueError, TypeError: it is something else.
            DataError: its unit set is none.
        """
        bodies, units = content["bodies"], content["n_units"]
        if not isinstance(units, int) or not 0 < units <= MOST_UNITS:
            raise ValueError(f"{units} units")
        if not isinstance(bodies, list) or not bodies or len(bodies) > MOST_UNITS:
            raise ValueError("no list of tokens")
        if any(not isinstance(body, str) or not 0 < len(body) <= _LONGEST_BODY for body in bodies):
            raise ValueError(f"a token that is no text of up to {_LONGEST_BODY} characters")
        given = content.get("unit_set")
        return cls(bodies, units, None if given is None else UnitSetIdentity.parse(given, where))
