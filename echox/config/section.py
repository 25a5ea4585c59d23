"""Defines what all sections of a recipe share: the base class, and the marks that say what a change of a key means."""

from __future__ import annotations

from enum import Enum
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

T = TypeVar("T")


class Change(Enum):
    """What it means for a trained run that a key of its recipe changes.

    A field carries the mark in its type, `Free[int]` or `Guarded[int]`; without one it has that of the section it is
    in, and outside marked sections `REFUSED`. `change_of` finds the mark of a key.
    """

    FREE = "free"
    """It says where and how a run computes, not what: it may change at every resume, and a finished run stays so."""
    GUARDED = "guarded"
    """A resume compares what the key stands for, not its text: models by hash, data and their order by fingerprint."""
    REFUSED = "refused"
    """It makes another training: a resume refuses it unless --allow names it."""


Free = Annotated[T, Change.FREE]
Guarded = Annotated[T, Change.GUARDED]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def own_mark(field: FieldInfo) -> Change | None:
    """The mark a field carries itself; None where it has that of its section."""
    return next((item for item in field.metadata if isinstance(item, Change)), None)


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, also where it may be null."""
    arms = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((arm for arm in arms if isinstance(arm, type) and issubclass(arm, Section)), None)
