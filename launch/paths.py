"""Resolves a job's relative paths outside Ray's temporary copy of the project, which is no place for runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from echox.config.paths import is_url
from echox.config.schema import InitConfig, Recipe
from echox.vocoder.recipe import VoiceRecipe
from launch.recipe import JobRecipe

JobT = TypeVar("JobT", Recipe, VoiceRecipe, JobRecipe)
HOME = "ECHOX_HOME"
"""Environment variable: the folder that relative storage, run and SQLite paths of a job start from."""

RESOLVED = "recipe.resolved.yaml"
"""The recipe in a run's folder, as its last job ran it: defaults filled in, paths absolute."""


def in_ray_copy(folder: Path) -> bool:
    """Whether a folder lies in Ray's copy of a working directory, which vanishes with the cluster."""
    return "runtime_resources" in folder.parts and any(part.startswith("_ray_pkg_") for part in folder.parts)


def home() -> Path:
    """$ECHOX_HOME; else the current folder; else, within Ray's temporary copy of the project, ~/echox."""
    if os.environ.get(HOME):
        return Path(os.environ[HOME]).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "echox" if in_ray_copy(here) else here


def make_absolute(recipe: JobT, start: Path) -> JobT:
    """The recipe with folders in `storage` and `init.*` and a relative SQLite URI made absolute, from `start`."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or is_url(path) else str((start / Path(path).expanduser()).absolute())

    uri = recipe.tracking.uri
    if uri and uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{start / uri.removeprefix('sqlite:///')}"
    tracking = recipe.tracking.model_copy(update={"uri": uri})
    places: dict[str, object] = {"storage": absolute(recipe.storage), "tracking": tracking}
    init: InitConfig | None = getattr(recipe, "init", None)  # a vocoder starts from no other run
    if init is not None:
        places["init"] = init.model_copy(update={part: absolute(getattr(init, part)) for part in ("s2t", "t2c")})
    return recipe.model_copy(update=places)
