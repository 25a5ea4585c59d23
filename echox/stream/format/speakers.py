"""Says who speaks the answer of a sample, as its builder, or the list that it was built from, has noted it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 1000
"""Characters of a name; what is longer is none."""


def answer_speaker(meta: Mapping[str, Any]) -> str:
    """Who speaks the answer; "" where the sample does not say.

    `answer_speaker`, else the synthetic voice that a build let speak it, else `speaker`: that of the only sound there
    is, so of a sample with a question it says nothing. Builders keep what a list says under `fields`.

    Args:
        meta: the `json` member.
    """
    return next((name for name in map(_name, _noted(meta)) if name), "")


def _noted(meta: Mapping[str, Any]) -> Iterator[Any]:
    fields = meta.get("fields")
    places = (meta, fields) if isinstance(fields, Mapping) else (meta,)
    yield from (place.get("answer_speaker") for place in places)
    yield meta.get("answer_spoken_by")
    if meta.get("task") not in ("sqa", "asr"):
        yield from (place.get("speaker") for place in places)


def _name(value: Any) -> str:
    """Text, or a number as some lists count their speakers, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = value.strip() if isinstance(value, str) else f"{value:d}"
    return text if len(text) <= LONGEST else ""
