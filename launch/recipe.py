"""Loads the recipe of a job, and says what differs between stages and vocoders; its key `stage` tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echox.config import schema
from echox.config.load import find_recipe, load_recipe, read_yaml
from echox.config.paths import resolve_file
from echox.config.schema import Recipe
from echox.vocoder import recipe as vocoder
from echox.vocoder.recipe import VoiceRecipe, load_voice

JobRecipe = Recipe | VoiceRecipe


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobRecipe:
    """Read, override and check the recipe of a stage, or of a vocoder.

    Args:
        path: YAML file, or the short name of one below launch/recipes.
        overrides: `key.sub=value` each.

    Raises:
        RecipeError: one sentence per mistake, all of them.
    """
    file = find_recipe(path)
    if read_yaml(file).get("stage") == vocoder.STAGE:
        return load_voice(file, overrides)
    return load_recipe(file, overrides)


def validated(tree: Mapping[str, Any]) -> JobRecipe:
    """The recipe of plain values that one was resolved to."""
    kind: type[JobRecipe] = VoiceRecipe if tree.get("stage") == vocoder.STAGE else Recipe
    return kind.model_validate(tree)


def train_function(recipe: JobRecipe) -> str:
    """`module:function` of what trains it in a worker."""
    if isinstance(recipe, VoiceRecipe):
        return "echox.vocoder.trainer:train_in_job"
    return "echox.engine.trainer:train"


def worker_counts(recipe: JobRecipe) -> tuple[int, ...]:
    """The numbers of workers within `scaling.workers` that its batch divides by, ascending."""
    return vocoder.worker_counts(recipe) if isinstance(recipe, VoiceRecipe) else schema.worker_counts(recipe)


def datasets(recipe: JobRecipe) -> list[str]:
    """What it trains and validates on, as it names them."""
    if isinstance(recipe, VoiceRecipe):
        return [*recipe.data.train, *([] if recipe.data.valid is None else [recipe.data.valid])]
    return [source.path for source in (*recipe.data.train, *recipe.data.valid)]


def config_files(recipe: JobRecipe) -> list[Path]:
    """Further files that say how it trains: of a stage, the DeepSpeed JSON."""
    return [] if isinstance(recipe, VoiceRecipe) else [resolve_file(recipe.engine.deepspeed)]
