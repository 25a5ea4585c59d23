"""Exports a whole run as one folder that may be taken anywhere: merged LLM, speech parts, recipe, and their hashes.

To Hugging Face it is the folder of the LLM. To `echox` it is a checkpoint, sealed by a manifest as those of runs are:
`echox speak`, `serve`, `evaluate` and `checkpoint verify` take it as a run, and recipes as `init`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import resolve_data_file, resolve_model
from echox.config.schema import InitConfig, Recipe, TrackingConfig
from echox.engine.checkpoint.checkpointer import library_versions
from echox.engine.checkpoint.manifest import CREATED, EXPORTED, describe_file, write_manifest
from echox.engine.checkpoint.recorded import ENCODER, LANGUAGE
from echox.release.folders import copy_own
from echox.units.language import UnitLanguage

if TYPE_CHECKING:
    from torch import Tensor

    from echox.release.trained import Trained

HERE = "."
"""In the recipe of an exported folder: the folder itself."""
VERSION = 1


def write_parts(trained: Trained, folder: Path, *, with_encoder: bool = False) -> None:
    """Write what makes an LLM's folder a whole model: weights of the speech parts, unit language, encoder if asked."""
    write_speech(trained.speech, folder)
    t2c, speech = trained.recipe.model.t2c, trained.recipe.model.speech_encoder
    if trained.recipe.stage == "echo" and t2c is not None:
        UnitLanguage.load(resolve_data_file(t2c.unit_language)).save(folder / LANGUAGE)
    if with_encoder and speech is not None:
        place = resolve_model(speech.path)
        copy_own(place, [path.relative_to(place).as_posix() for path in sorted(place.rglob("*"))], folder / ENCODER)


def write_speech(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of the speech parts, under their names in the stage."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / EXPORTED)


def seal(folder: Path, recipe: Recipe, contents: Mapping[str, Any]) -> None:
    """Say in `config.json` what the folder holds beside the LLM, and write the manifest over all of its files.

    What people edit, the model card and a recipe to go on with, comes after it.

    Args:
        folder: with everything else in it.
        recipe: of the run, in the places of this machine.
        contents: what the manifest says beside recipe and versions, as that of a run does.
    """
    _describe(folder, recipe)
    files = {
        path.relative_to(folder).as_posix(): describe_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    frozen = {name: {**model, "path": Path(model["path"]).name} for name, model in contents.get("frozen", {}).items()}
    whole: Any = {
        **contents,
        "frozen": frozen,
        "run": recipe.name,
        "stage": recipe.stage,
        "recipe": travelling(recipe, folder).model_dump(mode="json"),
        "created": time.strftime(CREATED, time.gmtime()),
        "versions": library_versions(),
    }
    write_manifest(folder, whole, files)


def kept_of(trained: Trained) -> dict[str, Any]:
    """What the manifest of an exported run takes over from the run's own."""
    manifest: Mapping[str, Any] = trained.manifest
    names = ("step", "updates", "attempt", "world_size", "metrics", "precision", "run_files")
    kept = {name: manifest[name] for name in names if name in manifest}
    kept["run_files"] = {name: entry for name, entry in kept.get("run_files", {}).items() if name == LANGUAGE}
    encoder = manifest.get("frozen", {}).get("speech_encoder")
    return {**kept, "frozen": {} if encoder is None else {"speech_encoder": encoder}}


def travelling(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe without the places of one machine; what lies in the folder is named by its place in it."""
    model = recipe.model
    speech, t2c = model.speech_encoder, model.t2c
    if speech is not None:
        place = f"{HERE}/{ENCODER}" if (folder / ENCODER).is_dir() else speech.path
        speech = speech.model_copy(update={"path": place})
    if recipe.stage != "echo":
        t2c = None  # what Stage I says of it is never read
    elif t2c is not None:
        t2c = t2c.model_copy(update={"unit_language": f"{HERE}/{LANGUAGE}"})
    llm = model.llm.model_copy(update={"path": HERE})
    data = recipe.data.model_copy(
        update={
            group: tuple(each.model_copy(update={"path": Path(each.path).name}) for each in getattr(recipe.data, group))
            for group in ("train", "valid")
        }
    )
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={"llm": llm, "speech_encoder": speech, "t2c": t2c}),
            "init": InitConfig(s2t=HERE, t2c=HERE if recipe.stage == "echo" else None),
            "data": data,
            "storage": "runs",
            "tracking": TrackingConfig(),
        }
    )


def _describe(folder: Path, recipe: Recipe) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    speech = recipe.model.speech_encoder
    config["echox"] = {
        "version": VERSION,
        "stage": recipe.stage,
        "weights": EXPORTED,
        "speech_encoder": "" if speech is None else Path(speech.path).name,
        "t2c": None if recipe.stage != "echo" or recipe.model.t2c is None else recipe.model.t2c.model_dump(mode="json"),
    }
    if config["echox"]["t2c"] is not None:
        config["echox"]["t2c"]["unit_language"] = LANGUAGE
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
