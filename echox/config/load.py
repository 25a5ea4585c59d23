"""Loads a recipe: reads the YAML file, applies command-line overrides, and reports every mistake at once.

A mistake in one key must not hide a mistake in another, so wrong leaves are taken out one after the other and the rest
is validated again, cross-section rules included; a rule that involves a wrong key is then left out, because what it
would say is a consequence of the first mistake.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from echox.config import deepspeed
from echox.config.mistakes import Mistake, did_you_mean, nearest, raise_all, shown
from echox.config.paths import project_root, resolve_file
from echox.config.schema import Breach, Recipe, change_of, cross_checks
from echox.config.section import Change, Section
from echox.errors import RecipeError
from echox.files import read_text

Loc = tuple[int | str, ...]
Schema = type[BaseModel]
SectionT = TypeVar("SectionT", bound=Section)
RECIPES = "recipes"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check one recipe.

    Args:
        path: YAML file, or the short name of a recipe below launch/recipes, such as `demo/s2t`.
        overrides: `key.sub=value` each; the value is read as YAML, list items by number (`data.train.0.repeat=2`).

    Raises:
        RecipeError: one sentence per mistake, all of them.
    """
    return load_checked(Recipe, find_recipe(path), overrides, cross_checks, _check_deepspeed_file)


def load_checked(
    schema: type[SectionT],
    file: Path,
    overrides: Sequence[str],
    rules: Callable[[SectionT], list[Breach]],
    files: Callable[[dict[str, Any]], list[Mistake]] = lambda tree: [],
) -> SectionT:
    """Read, override and check one file of a schema.

    Args:
        schema: what the file is to hold.
        file: YAML.
        overrides: as of `load_recipe`.
        rules: every rule that spans sections and that a valid tree breaks.
        files: mistakes in further files that the tree names.

    Raises:
        RecipeError: one sentence per mistake, all of them.
    """
    tree = read_yaml(file)
    mistakes: list[Mistake] = []
    for override in overrides:
        mistakes += _apply_override(tree, override)
    found, more = _validate(schema, tree, rules)
    mistakes += more
    mistakes += files(tree)
    raise_all(mistakes, _for_people(file))
    assert found is not None
    return found


def find_recipe(path: str | Path, kind: str = RECIPES) -> Path:
    """The file of a recipe given by path or by short name; RecipeError lists the short names otherwise."""
    given = resolve_file(str(path))
    if given.is_file():
        return given
    folder = project_root() / "launch" / kind
    for name in (f"{path}.yaml", str(path)):
        if (folder / name).is_file():
            return folder / name
    names = recipe_names(kind)
    raise RecipeError(f"recipe {path} was not found", fix=did_you_mean(str(path), names, noun="recipes"))


def recipe_names(kind: str = RECIPES) -> list[str]:
    """Short names of the recipes that come with the project, below `launch/recipes` or another folder of `launch`."""
    folder = project_root() / "launch" / kind
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def resolved(recipe: Section) -> dict[str, Any]:
    """The recipe with every default filled in, as plain JSON types: what the manifest and the tracker keep."""
    return recipe.model_dump(mode="json")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a resolved recipe that is no section; a list is one value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(recipe: Section) -> str:
    """sha256 over all keys but the free ones: equal for recipes that ask for the same training; 64 hex digits."""
    schema = type(recipe)
    kept = {key: value for key, value in leaves(resolved(recipe)) if change_of(key, schema) is not Change.FREE}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_MOST_ALIASES = 32
_DEEPEST = 100
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_LARGEST = 1 << 20
"""Bytes of a recipe."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans, and no key twice: `1e-4` is a number, `no` is a word."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f'key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is none, is nested too deeply, or repeats itself by so many aliases that a short text becomes
            a huge tree.
    """
    aliases = depth = 0
    for token in yaml.scan(text):
        aliases += isinstance(token, yaml.AliasToken)
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if aliases > _MOST_ALIASES:
            raise yaml.MarkedYAMLError(None, None, f"more than {_MOST_ALIASES} aliases", token.start_mark)
        if depth > _DEEPEST:
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply", token.start_mark)
    try:
        found = yaml.load(text, Loader=_Loader)
    except ValueError as error:  # a number of more digits than Python converts
        raise yaml.YAMLError(str(error)) from error
    if aliases and _holds_itself(found, ()):
        raise yaml.YAMLError("it holds itself by an alias")
    return found


def _holds_itself(tree: Any, around: tuple[int, ...]) -> bool:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return id(tree) in around or any(_holds_itself(each, (*around, id(tree))) for each in inside)


def read_yaml(file: Path) -> dict[str, Any]:
    """The tree of one YAML file; RecipeError with line and column when it is not YAML, or no mapping."""
    try:
        tree = parse_yaml(read_text(file, _LARGEST))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{_for_people(file)}:{mark.line + 1}:{mark.column + 1}" if mark else _for_people(file)
        raise RecipeError(f"not valid YAML: {error.problem}", where=where, fix="correct that line") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe cannot be read: {error}", where=_for_people(file)) from None
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=_for_people(file), fix="see launch/recipes")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> list[Mistake]:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        return [Mistake("", f"override {shown(override)} is not key=value", "write for example optim.steps=100")]
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return [Mistake(key, f"override value {shown(text)} is not valid YAML", "quote it")]
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return [_no_such_item(parents[:depth], part, node)]
            node = node[int(part)]
            continue
        child = node.get(part)
        if not isinstance(child, dict | list):
            # An override may open a section the file leaves out; a value in its place is replaced by it.
            child = node[part] = {}
        node = child
    if isinstance(node, list):
        if not leaf.isdigit() or int(leaf) >= len(node):
            return [_no_such_item(parents, leaf, node)]
        node[int(leaf)] = value
    else:
        node[leaf] = value
    return []


def _no_such_item(path: Sequence[str], part: str, node: list[Any]) -> Mistake:
    rule = f'override item "{part}" does not exist'
    return Mistake(".".join(path), rule, f"the list has items 0 to {len(node) - 1}" if node else "the list is empty")


def _validate(
    schema: type[SectionT], tree: dict[str, Any], rules: Callable[[SectionT], list[Breach]]
) -> tuple[SectionT | None, list[Mistake]]:
    """The recipe where it is right, and every mistake where it is not."""
    tree = copy.deepcopy(tree)
    mistakes: list[Mistake] = []
    wrong: set[str] = set()
    while True:
        try:
            text = json.dumps(tree, default=str)
            recipe = schema.model_validate_json(text, strict=True, context={"cross_checks": False})
        except ValidationError as error:
            details = _by_field(schema, error.errors(include_url=False))
        else:
            breaches = [b for b in rules(recipe) if not any(_related(k, w) for k in b.keys for w in wrong)]
            mistakes += [Mistake("", breach.rule, breach.fix) for breach in breaches]
            return (None if mistakes else recipe), mistakes
        # A misspelt required key is one mistake, not an unknown key plus a missing one; a list counts as empty
        # for pydantic when all its items are wrong.
        meant = {_meant(schema, detail["loc"]) for detail in details if _unknown(detail)}
        owners = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
        for detail in details:
            if detail["loc"] in owners:
                continue
            if not (detail["type"] == "missing" and detail["loc"] in meant):
                mistakes.append(_mistake(schema, detail))
            wrong.add(_dotted(detail["loc"]))
            _take_out(schema, tree, detail["loc"])


def _by_field(schema: Schema, details: list[ErrorDetails]) -> list[ErrorDetails]:
    """The mistakes, with one for a value that may be a number or a word: pydantic has one for each of both."""
    found: dict[Loc, ErrorDetails] = {}
    for detail in details:
        words = _words(_annotation(schema, detail["loc"][:-1]))
        if words:
            detail = {**detail, "loc": detail["loc"][:-1], "msg": f"{detail['msg']}, or {' or '.join(words)}"}
        found.setdefault(detail["loc"], detail)
    return list(found.values())


def _words(annotation: Any) -> list[str]:
    """Words that a value of a schema type may be in place of a number; none for other types."""
    arms = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [str(word) for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]


def _meant(schema: Schema, loc: Loc) -> Loc:
    return (*loc[:-1], nearest(str(loc[-1]), _fields(schema, loc[:-1])) or "")


def _related(key: str, bad: str) -> bool:
    return key == bad or key.startswith(bad + ".") or bad.startswith(key + ".")


def _take_out(schema: Schema, tree: dict[str, Any], loc: Loc) -> None:
    """Remove a wrong leaf; where it is required, put in a value that is right by its type alone."""
    node: Any = tree
    for part in loc[:-1]:
        if isinstance(node, dict) and part not in node:
            return  # its section or list is already out
        node = node[part]
    if isinstance(node, list):
        _take_out(schema, tree, loc[:-1])
        return
    field = _field(schema, loc)
    if field is not None and field.is_required():
        node[loc[-1]] = _placeholder(field.annotation)
    else:
        node.pop(loc[-1], None)


def _placeholder(annotation: Any) -> Any:
    """A small valid value of a schema type; rules that would read it are left out of the report."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {n: _placeholder(f.annotation) for n, f in annotation.model_fields.items() if f.is_required()}
    if get_origin(annotation) is tuple:
        return [_placeholder(get_args(annotation)[0])]
    if get_args(annotation):
        return get_args(annotation)[0]
    return {int: 1, float: 1.0, bool: False}.get(annotation, "x")


def _mistake(schema: Schema, detail: ErrorDetails) -> Mistake:
    loc, kind, value = detail["loc"], detail["type"], detail["input"]
    key = _dotted(loc)
    if _unknown(detail):
        siblings = _fields(schema, loc[:-1])
        fix = did_you_mean(str(loc[-1]), siblings)
        if nearest(str(loc[-1]), siblings) is None:
            homes = [home for home in _homes(schema, str(loc[-1])) if home != key]
            fix = f'did you mean "{homes[0]}"?' if homes else fix
        return Mistake(key, "unknown key", fix)
    field = _field(schema, loc)
    about = f" ({field.description})" if field is not None and field.description else ""
    annotation = _bare(_annotation(schema, loc))
    if kind == "missing":
        return Mistake(key, f"required, but missing{about}", f"add it as {_example(annotation)}")
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(annotation)]
        guess = nearest(str(value), choices)
        hint = f'did you mean "{guess}"?' if guess else f"write {choices[0]}"
        return Mistake(f"{key}={shown(value)}", f"must be one of {', '.join(choices)}", hint)
    rule = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        return Mistake(
            f"{key}={shown(value)}", "may hold letters, digits, dots, dashes and underscores only", "rename it"
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        rule = "a section with keys"
    if kind == "too_short":
        rule = f"a list of at least {detail['ctx']['min_length']}"
    fix = detail.get("ctx", {}).get("fix") or f"write {_example(annotation)}"
    return Mistake(f"{key}={shown(value)}", f"must be {rule}{about}", fix)


def _example(annotation: Any) -> str:
    """What a value of this type looks like in a recipe."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        required = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return f"a section with {', '.join(required) or 'its keys'}"
    if get_origin(annotation) is tuple:
        return f"a list, each item {_example(get_args(annotation)[0])}"
    if get_args(annotation):
        return f"one of {', '.join(str(choice) for choice in get_args(annotation))}"
    return {int: "a whole number such as 1", float: "a number such as 0.1", bool: "true or false"}.get(
        annotation, "text"
    )


def _unknown(detail: ErrorDetails) -> bool:
    return detail["type"] == "extra_forbidden"


def _dotted(loc: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in loc)


def _bare(annotation: Any) -> Any:
    """The type behind `X | None`."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(arm for arm in get_args(annotation) if arm is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _annotation(schema: Schema, loc: Loc) -> Any:
    """The schema type at a path; None where the path leaves the schema."""
    node: Any = schema
    for part in loc:
        node = _bare(node)
        if isinstance(node, type) and issubclass(node, BaseModel):
            field = node.model_fields.get(str(part))
            node = field.annotation if field else None
        elif get_origin(node) is tuple:
            node = get_args(node)[0]
        else:
            return None
    return node


def _field(schema: Schema, loc: Loc) -> Any:
    """The schema field at a path, or None for list items and unknown keys."""
    owner = _bare(_annotation(schema, loc[:-1]))
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        return owner.model_fields.get(str(loc[-1]))
    return None


def _fields(schema: Schema, loc: Loc) -> list[str]:
    owner = _bare(_annotation(schema, loc))
    return list(owner.model_fields) if isinstance(owner, type) and issubclass(owner, BaseModel) else []


def _homes(model: type[BaseModel], name: str, prefix: str = "") -> list[str]:
    """Every place in the schema where a key of this name belongs."""
    found = []
    for field_name, field in model.model_fields.items():
        if field_name == name:
            found.append(prefix + field_name)
        annotation = _bare(field.annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found += _homes(annotation, name, f"{prefix}{field_name}.")
    return found


def _check_deepspeed_file(tree: dict[str, Any]) -> list[Mistake]:
    """The engine's JSON is part of the recipe: its absence or a misspelt key is reported with the rest."""
    engine = tree.get("engine")
    ref = engine.get("deepspeed") if isinstance(engine, dict) else None
    if not isinstance(ref, str):
        return []
    found = deepspeed.check_file(resolve_file(ref))
    return [Mistake(f"{ref}: {m.key}" if m.key else "engine.deepspeed", m.rule, m.fix) for m in found]


def _for_people(file: Path) -> str:
    """A path relative to the current folder where it lies below it."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
