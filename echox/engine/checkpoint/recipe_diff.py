"""Decides with which changes of its recipe a run may resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from echox.config.load import leaves
from echox.config.schema import Recipe, change_of
from echox.config.section import Change, Section


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of everything that differs; None where a side lacks the key."""
    old, new = dict(leaves(before)), dict(leaves(now))
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def refused_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str] = (), schema: type[Section] = Recipe
) -> list[tuple[str, Any, Any]]:
    """The changes that would make another training of the run, unless `allow` names them.

    A word of `allow` names a key in full, a section, or any key or section of that last name: `lr` is `optim.lr`.
    """
    return [
        (key, old, new)
        for key, old, new in changes(before, now)
        if change_of(key, schema) is Change.REFUSED and not any(_names(word, key) for word in allow)
    ]


def _names(word: str, key: str) -> bool:
    return f"{key}.".startswith(f"{word}.") or word in key.split(".")
