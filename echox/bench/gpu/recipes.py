"""Reads the recipes of a benchmark as they resolved when they were last written, for a machine without pydantic.

`python -m echox.bench.gpu.recipes` writes them again from launch/recipes; a test holds that they are the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from echox.units.word_limit import UNKNOWN

if TYPE_CHECKING:
    from echox.config.schema import Recipe

FILE = Path(__file__).with_name("recipes.json")
NAMES = tuple(f"{scale}/{stage}" for scale in ("3b", "8b") for stage in ("s2t", "t2c", "echo"))
SECTIONS = {"name", "stage", "scale", "model", "engine", "data", "optim"}


def plain_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe as a tree of attributes; `changes` are dotted keys with `__` for the dot."""
    tree = copy.deepcopy(json.loads(FILE.read_text(encoding="utf-8"))[name])
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = tree
        for section in sections:
            part = part[section]
        if last not in part:
            raise KeyError(f"{name} has no {key}")
        part[last] = value
    return cast("Recipe", _attributes(tree))


def resolved(name: str) -> dict[str, Any]:
    """The sections of a recipe that a step needs, with all defaults, as JSON has them; nothing is learned of a run."""
    from echox.config.load import load_recipe

    tree: dict[str, Any] = load_recipe(name).model_dump(mode="json", include=SECTIONS)
    if tree["model"]["echo"]["units_per_token"] == "auto":
        tree["model"]["echo"]["units_per_token"] = UNKNOWN
    return tree


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{key: _attributes(each) for key, each in value.items()})
    return [_attributes(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(resolved(name))}' for name in NAMES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
