"""Reads the weights that a stage starts from: of a run, or of a folder that `echox export` or `echox import` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echox.config.paths import cache_dir, resolve_model
from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.contents import Manifest
from echox.engine.checkpoint.recorded import is_exported
from echox.engine.frozen import compare_identities, identify
from echox.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = "teacher.decoder."
"""Under which names Stage III has its T2C teacher."""
OWN_TABLE = "t2c_text.own_Vh"
"""Its name of a text table that is none of the LLM's."""


def earlier_tensors(ref: str | None, part: Literal["s2t", "t2c"], stage: str) -> dict[str, Tensor]:
    """Weights that a stage starts from, by the names that they have in the stage they come from; none without a run.

    An exported folder is an s2t and a t2c at once: as `s2t` it gives Stage III also the Echo path that it has, as `t2c`
    the teacher.

    Raises:
        CheckpointError: there are none, they cannot be read, or an exported folder has no teacher.
    """
    if ref is None:
        return {}
    weights = find_weights(ref)
    tensors = read_tensors(weights)
    if not is_exported(weights.parent):
        return tensors
    if part == "s2t":
        return {name: value for name, value in tensors.items() if _starts_from(name, stage)}
    teacher = {
        f"t2c.{name.removeprefix(TEACHER)}": value for name, value in tensors.items() if name.startswith(TEACHER)
    }
    if not teacher:
        fix = "name a Stage II run as init.t2c"
        raise CheckpointError("the exported folder is of Stage I, which has no T2C", where=str(ref), fix=fix)
    return teacher | {name: tensors[name] for name in (OWN_TABLE,) if name in tensors}


def _starts_from(name: str, stage: str) -> bool:
    return name.startswith("s2t.") or (stage == "echo" and not name.startswith((TEACHER, OWN_TABLE)))


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is none, or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(weights)
    except SafetensorError as error:
        fix = "copy them again"
        raise CheckpointError(f"the weights cannot be read: {error}", where=str(weights), fix=fix) from error


def check_frozen(recipe: Recipe, manifest: Manifest) -> None:
    """Compare the pretrained models and earlier runs that weights mean nothing without, where a manifest records them.

    Raises:
        AlteredModelError, MissingModelError: one is another now, or gone.
    """
    saved = manifest.get("frozen", {})
    if not saved:
        return
    assert recipe.model.speech_encoder is not None
    refs = {"llm": recipe.model.llm.path, "speech_encoder": recipe.model.speech_encoder.path}
    folders = {name: resolve_model(ref) for name, ref in refs.items() if name in saved}
    for part in ("s2t", "t2c"):
        ref = getattr(recipe.init, part)
        if f"init.{part}" in saved and ref is not None:
            folders[f"init.{part}"] = find_weights(ref).parent
    compare_identities(saved, identify(folders, cache_dir() / "sha256.json"))
