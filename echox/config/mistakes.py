"""Describes mistakes in a recipe or a DeepSpeed JSON, and raises them all as one error."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from echox.errors import RecipeError


@dataclass(frozen=True)
class Mistake:
    """What is wrong at one key.

    Attributes:
        key: dotted path, such as `optim.lr.lora`; empty for the file as a whole.
        rule: the value at fault and the rule it breaks, as it reads after the key.
        fix: what to write instead.
    """

    key: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}{': ' if self.key else ''}{self.rule}; {self.fix}"


def shown(value: object, limit: int = 60) -> str:
    """A value as it would be written in the file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word a person most probably meant, if any is close."""
    candidates = list(known)
    close = difflib.get_close_matches(word.lower(), [item.lower() for item in candidates], n=1, cutoff=0.6)
    if not close:
        return None
    return next(item for item in candidates if item.lower() == close[0])


def did_you_mean(word: str, known: Iterable[str], noun: str = "keys") -> str:
    """`did you mean "steps"?` where something is close, else the list of what is known."""
    candidates = sorted(known)
    guess = nearest(word, candidates)
    if guess is not None:
        return f'did you mean "{guess}"?'
    return f"known {noun}: {', '.join(candidates)}" if candidates else "remove it"


def raise_all(mistakes: Sequence[Mistake], file: str) -> None:
    """Raise one RecipeError that lists every mistake, or return when there is none."""
    if not mistakes:
        return
    count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "1 mistake"
    lines = "\n".join(f"  - {mistake}" for mistake in mistakes)
    raise RecipeError(f"{count} in {file}:\n{lines}\nNothing was started.")
