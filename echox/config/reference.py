"""Writes the reference of recipe keys, `README.md` beside this file, from the schema's docstrings and descriptions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from echox.config.schema import Recipe, change_of
from echox.config.section import Section, section_in

README = Path(__file__).with_name("README.md")
_TOP = """\
# What can a recipe say?

A recipe is a YAML file that describes one run: a stage, at a scale. These are all its keys. A dot stands for a level of
nesting in the file, and `N` for the number of an item in a list, from 0. On the command line a key is written in full:

```bash
echox train demo/s2t optim.steps=1000 data.train.0.repeat=2
```

The last column of the tables says what a change of the key means for what was trained without it:

| mark | a run that is resumed | a finished stage of `make demo` |
|---|---|---|
| free | goes on: the key says where and how a run computes, not what | is kept |
| guarded | goes on if the frozen models have the same hashes, and the data the same fingerprints and order; \
`--accept-new-data` begins a new epoch on other data | is trained again |
| refused | does not go on, since it would be another training, unless `--allow` names the key | is trained again |

"U1" to "U27" number what the [paper](https://arxiv.org/abs/2509.09174) leaves open: the default there is a choice of
this project. "As released" refers to the code that the authors released, "Eq." to an equation of the paper.

This page is made from the docstrings and descriptions in `schema.py` and `model_schema.py`. After a change there, write
it again:

```bash
echox recipe keys --write
```
"""
_HEAD = "| key | type | default | meaning and unit | on resume |\n|---|---|---|---|---|\n"
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
_NAMES = {int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One section of the recipe, with the keys that stand in it directly.

    Attributes:
        path: dotted key of the section, "" for the recipe itself; an item of a list is called N.
        section: its class.
        optional: the recipe may leave it out, and the run then has no such part.
        keys: full dotted key and field of each value and list in it.
    """

    path: str
    section: type[Section]
    optional: bool
    keys: Sequence[tuple[str, FieldInfo]]


def tables(section: type[Section] = Recipe, path: str = "", *, optional: bool = False) -> Iterator[Table]:
    """A section and all sections below it, in the order of the schema."""
    fields = [(f"{path}.{name}" if path else name, field) for name, field in section.model_fields.items()]
    values = [(key, field) for key, field in fields if section_in(field.annotation) is None]
    yield Table(path=path, section=section, optional=optional, keys=values)
    for key, field in fields:
        inner, item = section_in(field.annotation), _item(field.annotation)
        if inner is not None:
            yield from tables(inner, key, optional=field.default is None)
        elif item is not None:
            yield from tables(item, f"{key}.N")


def reference() -> str:
    """The page: a table for each section, in Markdown."""
    return _TOP + "".join(_markdown(table) for table in tables())


def type_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value of a schema type may be, in words; `metadata` holds its bounds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(args[0], (*args[1:], *metadata))
    if origin in (Union, UnionType):
        return " or ".join("`null`" if arm is type(None) else type_of(arm, metadata) for arm in args)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {count}{type_of(args[0])}s{_limits(metadata)}"
    if annotation is bool:
        return "`true`, `false`"
    return f"{_NAMES.get(annotation, 'section')}{_limits(metadata)}"


def _markdown(table: Table) -> str:
    title = f"`{table.path}`" if table.path else "The recipe"
    about = inspect.cleandoc(table.section.__doc__ or "")
    absent = "\n\nAbsent by default; `required` below holds where it is given." if table.optional else ""
    rows = "".join(_row(key, field) for key, field in table.keys)
    return f"\n## {title}\n\n{about}{absent}\n\n{_HEAD}{rows}"


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
    cells = (f"`{key}`", type_of(field.annotation, field.metadata), default, field.description, change_of(key).value)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def _item(annotation: Any) -> type[Section] | None:
    """The section that each item of a list is; None for other types."""
    return section_in(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def _limits(metadata: Sequence[Any]) -> str:
    """The bounds of a number, or that a text or list may not be empty."""
    bounds = [f"{sign} {getattr(item, name)}" for item in metadata for name, sign in _BOUNDS if hasattr(item, name)]
    empty = ", not empty" if any(hasattr(item, "min_length") for item in metadata) else ""
    return (f" {', '.join(bounds)}" if bounds else "") + empty
