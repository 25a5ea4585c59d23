"""Writes and reads a project's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from echox.config.load import load_recipe, read_yaml
from echox.config.schema import Recipe
from echox.errors import RecipeError
from echox.files import write_atomically
from echox.vocoder.recipe import VoiceRecipe, load_voice
from launch.project.plan import Project

FILE = "project.yaml"
_ABOUT = "# What `echox run` begins with; the recipes beside it say how it trains. Change them, and run again.\n"


def write_recipes(project: Project, texts: dict[str, str]) -> dict[str, Recipe | VoiceRecipe]:
    """Write the recipes of a project, and read them again.

    Returns:
        File name to recipe.

    Raises:
        RecipeError: there is a project in the folder, or a recipe is wrong.
    """
    if (project.folder / FILE).exists():
        fix = "change its files and run it, or give another name"
        raise RecipeError("there is a project already", where=str(project.folder), fix=fix)
    project.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Recipe | VoiceRecipe] = {}
    for name, text in texts.items():
        place = project.folder / name
        write_atomically(place, text)
        found[name] = load_voice(place) if name == "vocoder.yaml" else load_recipe(place)
    return found


def write(project: Project, clusters: int, remarks: list[str]) -> None:
    """Write what a project begins with and what was found of it, `project.yaml` last."""
    lines = "\n".join(f"- {line}" for line in remarks)
    title = f"# {project.folder.name}\n\n"
    how = f"\n\n```bash\nechox run {project.folder}\n```\n\ndoes what is left to do, also after a change or a kill.\n"
    write_atomically(project.folder / "README.md", f"{title}{lines}{how}")
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(project).items()}
    del values["folder"]
    write_atomically(project.folder / FILE, _ABOUT + yaml.safe_dump({**values, "clusters": clusters}, sort_keys=False))


def read(folder: Path) -> tuple[Project, int]:
    """A project and the number of its units.

    Raises:
        RecipeError: it is none.
    """
    place = folder / FILE
    if not place.is_file():
        raise RecipeError(
            "there is no project", where=str(folder), fix="make one: echox new NAME --llm ... --voice ..."
        )
    tree = read_yaml(place)
    try:
        project = Project(
            folder=folder.absolute(),
            llm=_text(tree, "llm"),
            voice=Path(_text(tree, "voice")),
            questions=_path(tree, "questions"),
            language=_maybe(tree, "language"),
            whisper=_text(tree, "whisper"),
            recogniser=_maybe(tree, "recogniser"),
            speaker=_path(tree, "speaker"),
            judge=_maybe(tree, "judge"),
            held_out=_share(tree, "held_out"),
            gpus=_number(tree, "gpus"),
        )
        return project, _number(tree, "clusters")
    except (KeyError, TypeError) as error:
        raise RecipeError(f"it has no usable {error}", where=str(place), fix="write it as `echox new` does") from error


def _text(tree: dict[str, Any], name: str) -> str:
    if not isinstance(tree[name], str) or not tree[name]:
        raise TypeError(name)
    return str(tree[name])


def _maybe(tree: dict[str, Any], name: str) -> str | None:
    return None if tree.get(name) is None else _text(tree, name)


def _path(tree: dict[str, Any], name: str) -> Path | None:
    found = _maybe(tree, name)
    return None if found is None else Path(found)


def _number(tree: dict[str, Any], name: str) -> int:
    if isinstance(tree[name], bool) or not isinstance(tree[name], int) or tree[name] < 0:
        raise TypeError(name)
    return int(tree[name])


def _share(tree: dict[str, Any], name: str) -> float:
    # The rest is trained on.
    if isinstance(tree[name], bool) or not isinstance(tree[name], int | float) or not 0 < tree[name] < 0.5:
        raise TypeError(name)
    return float(tree[name])
