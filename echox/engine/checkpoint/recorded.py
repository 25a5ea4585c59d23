"""Reads the recipe that a checkpoint or an exported folder was made by."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from echox.config.schema import InitConfig, Recipe
from echox.engine.checkpoint.manifest import EXPORTED, read_manifest, weights_name
from echox.errors import CheckpointError

LANGUAGE = "unit_language.json"
"""The unit language of a run or an exported folder."""
ENCODER = "speech_encoder"
"""The Whisper model of an exported folder, where it has one."""


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe of a checkpoint; that of an exported folder names the parts that lie in it.

    Raises:
        CheckpointError: its manifest holds none that this version knows.
    """
    try:
        recipe = Recipe.model_validate(read_manifest(checkpoint)["recipe"])
        return _at(recipe, checkpoint) if is_exported(checkpoint) else recipe
    except (ValidationError, KeyError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise CheckpointError(
            f"the recipe of the checkpoint is none: {said}", where=str(checkpoint), fix="name another checkpoint"
        ) from error


def is_exported(checkpoint: Path) -> bool:
    """Whether a folder is one that `echox export` or `echox import` wrote."""
    return weights_name(checkpoint) == EXPORTED


def _at(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of an exported folder with the places that its parts have there, wherever the folder was taken."""
    model, here = recipe.model, str(folder)
    speech = model.speech_encoder
    if speech is not None and (folder / ENCODER).is_dir():
        speech = speech.model_copy(update={"path": str(folder / ENCODER)})
    t2c = model.t2c
    if t2c is not None:
        t2c = t2c.model_copy(update={"unit_language": str(folder / LANGUAGE)})
    llm = model.llm.model_copy(update={"path": here})
    model = model.model_copy(update={"llm": llm, "speech_encoder": speech, "t2c": t2c})
    init = InitConfig(s2t=here, t2c=here if recipe.stage == "echo" else None)
    return recipe.model_copy(update={"model": model, "init": init})
