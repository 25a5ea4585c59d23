"""Turns `key=a,b,c` into the trials of a sweep: all combinations, or draws from ranges."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from echox.errors import RecipeError

_RANGE = re.compile(r"(uniform|loguniform|choice)\((.*)\)")
_OPEN, _CLOSE = "[{(\"'", "]})\"'"


@dataclass(frozen=True)
class Trial:
    """One setting.

    Attributes:
        name: of its run: the recipe's, and a hash of what is set, so that the same setting is the same run in every
            sweep.
        values: swept keys and what each is here.
        overrides: for the recipe, those that all trials have included.
    """

    name: str
    values: dict[str, str]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class _Draw:
    kind: str
    values: tuple[str, ...]

    def one(self, rng: random.Random) -> str:
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = map(float, self.values)
        drawn = (
            rng.uniform(low, high) if self.kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high)))
        )
        return f"{drawn:.4g}"


@dataclass(frozen=True)
class Space:
    """What a sweep tries.

    Attributes:
        fixed: `key=value` of all trials.
        grid: keys and all the values of each.
        drawn: keys and what their values are drawn from.
    """

    fixed: tuple[str, ...]
    grid: Mapping[str, Sequence[str]]
    drawn: Mapping[str, _Draw]

    def trials(self, run: str, samples: int | None, seed: int) -> list[Trial]:
        """All trials, none twice.

        Args:
            run: name of the recipe's run.
            samples: draws; None where nothing is drawn. With a grid beside them, each is tried at every point.
            seed: of the draws.

        Raises:
            RecipeError: draws without a number of them, or a number without draws.
        """
        if bool(self.drawn) != (samples is not None):
            named = ", ".join(self.drawn)
            fix = f"add --samples N: {named} is drawn" if named else "leave --samples out, or give a range"
            raise RecipeError("--samples goes with ranges to draw from, and these with it", fix=fix)
        rng = random.Random(seed)
        draws = [{key: draw.one(rng) for key, draw in self.drawn.items()} for _ in range(samples or 1)]
        points = [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*self.grid.values())]
        found = [_trial(run, {**point, **draw}, self.fixed) for draw in draws for point in points]
        return list({trial.name: trial for trial in found}.values())


def space(words: Sequence[str]) -> Space:
    """What a command's words mean.

    Args:
        words: `key=value` for all trials, `key=a,b,c` for a grid, `key=uniform(low,high)`, `loguniform(low,high)` or
            `choice(a,b,c)` to draw from.

    Raises:
        RecipeError: nothing is swept, or a range is none.
    """
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    drawn: dict[str, _Draw] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word} is no key=value", fix="write key=a,b,c")
        if (found := _RANGE.fullmatch(value)) is not None:
            drawn[key] = _draw(key, found[1], _split(found[2]))
        elif len(values := _split(value)) > 1:
            grid[key] = list(dict.fromkeys(values))
        else:
            fixed.append(word)
    if not grid and not drawn:
        raise RecipeError("nothing is swept", fix="give a key several values, as in optim.lr.llm=1e-4,2e-4")
    return Space(tuple(fixed), grid, drawn)


def _trial(run: str, values: dict[str, str], fixed: Sequence[str]) -> Trial:
    words = [f"{key}={value}" for key, value in values.items()]
    digest = hashlib.sha256("\n".join(sorted([*words, *fixed])).encode()).hexdigest()[:8]
    return Trial(
        f"{run}-{digest}", values, (*fixed, *words, f"name={run}-{digest}", f"tracking.parent_run={run}-sweep")
    )


def _draw(key: str, kind: str, values: Sequence[str]) -> _Draw:
    if kind != "choice":
        try:
            low, high = map(float, values)
        except ValueError as error:
            raise RecipeError(f"{key}={kind}({','.join(values)}) has no two numbers", fix=f"{kind}(1,10)") from error
        if not low < high or kind == "loguniform" and low <= 0:
            raise RecipeError(
                f"{key}={kind}({low:g},{high:g}) is empty", fix="the lower number first, above 0 for logs"
            )
    return _Draw(kind, tuple(values))


def _split(value: str) -> list[str]:
    """Parts between commas that are in no bracket or quote: those of a YAML list belong to it."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in _OPEN) - (letter in _CLOSE)
        parts[-1] += letter
    return [part.strip() for part in parts]
