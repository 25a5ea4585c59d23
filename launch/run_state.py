"""Decides whether an earlier run of a stage or vocoder can be reused, continued, or has to make room for another."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from echox.builders.data import listings
from echox.config.load import fingerprint
from echox.config.schema import Recipe
from echox.engine.checkpoint.manifest import newest_manifest
from echox.vocoder.recipe import VoiceRecipe

State = Literal["none", "partial", "done", "stale"]


def run_state(recipe: Recipe | VoiceRecipe) -> tuple[State, str]:
    """What an earlier run of this recipe (paths absolute) is worth, and why.

    `done`: trained to the end by this recipe or one that differs in free keys alone, after the runs it starts from and
    after its data were made. `partial`: the same, not yet at the end: submitting it continues it. `stale`: made by
    another recipe or from other inputs. `none`: nothing was saved.
    """
    folder = Path(recipe.storage) / recipe.name
    path = newest_manifest(folder)
    if path is None:
        return "none", "nothing trained yet"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        before = type(recipe).model_validate(manifest["recipe"])
    except (OSError, ValueError, KeyError, ValidationError):
        return "stale", "its checkpoint is of another version"
    if fingerprint(before) != fingerprint(recipe):
        return "stale", "the recipe changed"
    made = path.stat().st_mtime
    for source in _runs_before(recipe):
        upstream = newest_manifest(source)
        if upstream is not None and upstream.stat().st_mtime > made:
            return "stale", f"{source.name} was trained again"
    for name, listing in listings(_data(recipe)).items():
        if listing.stat().st_mtime > made:
            return "stale", f"{name} was built again"
    if int(manifest.get("step", 0)) < recipe.optim.steps:
        return "partial", f"continues at step {manifest['step']} of {recipe.optim.steps}"
    return "done", f"{recipe.name} has its {recipe.optim.steps} steps"


def _runs_before(recipe: Recipe | VoiceRecipe) -> list[Path]:
    """Folders of the runs whose weights it starts from; a vocoder starts from none."""
    if isinstance(recipe, VoiceRecipe):
        return []
    return [Path(source) for source in (recipe.init.s2t, recipe.init.t2c) if source]


def _data(recipe: Recipe | VoiceRecipe) -> list[str]:
    if isinstance(recipe, VoiceRecipe):
        return list(recipe.data.train)
    return [source.path for source in recipe.data.train]


def set_aside(recipe: Recipe | VoiceRecipe) -> Path | None:
    """Move a run's folder out of the way, keeping it; returns where it went."""
    folder = Path(recipe.storage) / recipe.name
    if not folder.exists():
        return None
    aside = folder.parent / "replaced" / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.parent.mkdir(parents=True, exist_ok=True)
    return folder.rename(aside)
