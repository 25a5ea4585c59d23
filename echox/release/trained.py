"""Reads a trained run for export: its recipe, and all tensors of its module but those of the pretrained parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.contents import Manifest
from echox.engine.checkpoint.manifest import read_manifest
from echox.engine.checkpoint.recorded import is_exported, recipe_of
from echox.errors import CheckpointError
from echox.release.exported import OWN_TABLE, TEACHER, check_frozen, earlier_tensors, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

LLM = "s2t.llm."
"""Under which names Stage I and III have the LLM, as PEFT wraps it."""
LORA = ".lora_"
"""What the names of its update have in them."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run, or an exported folder.

    Attributes:
        checkpoint: its folder.
        recipe: as it was trained, with the unit language that the run keeps.
        manifest: of the checkpoint.
        tensors: of the stage's module by name: what trained in it and in the stages it started from.
    """

    checkpoint: Path
    recipe: Recipe
    manifest: Manifest
    tensors: dict[str, Tensor]

    @property
    def lora(self) -> dict[str, Tensor]:
        """The update of the LLM, by PEFT's names."""
        return {name.removeprefix(LLM): value for name, value in self.tensors.items() if name.startswith(LLM)}

    @property
    def speech(self) -> dict[str, Tensor]:
        """Everything else."""
        return {name: value for name, value in self.tensors.items() if not name.startswith(LLM)}

    @property
    def exported(self) -> bool:
        """Whether it is an exported folder, whose LLM has its update merged."""
        return is_exported(self.checkpoint)


def read_trained(run: Path) -> Trained:
    """Read a run of Stage I or III, a checkpoint of one, or an exported folder.

    Raises:
        CheckpointError: there is no good checkpoint, or it is of Stage II, or one that it started from is gone.
        AlteredModelError: a model or run that it was trained beside is no longer the one it was.
        MissingModelError: it is not there.
    """
    from echox.builders.unit_sets import with_own_language

    weights = find_weights(run)
    checkpoint = weights.parent
    recipe = recipe_of(checkpoint)
    if recipe.stage == "t2c":
        raise CheckpointError(
            "a t2c run has no language model of its own", where=str(checkpoint), fix="name an s2t or echo run"
        )
    manifest = read_manifest(checkpoint)
    check_frozen(recipe, manifest)
    tensors = read_tensors(weights)
    if not is_exported(checkpoint):
        tensors = _with_earlier(recipe, tensors)
    recipe = with_own_language(recipe, checkpoint)
    return Trained(checkpoint=checkpoint, recipe=recipe, manifest=manifest, tensors=tensors)


def _with_earlier(recipe: Recipe, own: dict[str, Tensor]) -> dict[str, Tensor]:
    if recipe.stage == "s2t":
        return own
    t2c = earlier_tensors(recipe.init.t2c, "t2c", recipe.stage)
    table = {name: t2c.pop(name) for name in (OWN_TABLE,) if name in t2c}
    teacher = {TEACHER + name.removeprefix("t2c."): value for name, value in t2c.items()}
    return {**table, **teacher, **earlier_tensors(recipe.init.s2t, "s2t", recipe.stage), **own}
