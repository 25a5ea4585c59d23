"""Writes a trained run in the format asked for, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from echox.errors import RecipeError
from echox.release.folders import check_free, new_folder
from echox.release.model_card import write_card
from echox.release.trained import Trained, read_trained

if TYPE_CHECKING:
    import torch


def export(run: Path, out: Path, form: str, *, dtype: str | None = None, with_encoder: bool = False) -> dict[str, int]:
    """Export a run.

    Args:
        run: run, checkpoint or exported folder.
        out: new folder.
        form: `hf`, `merged`, `peft` or `echox`.
        dtype: of a merged LLM; None for that of the run.
        with_encoder: with `hf`, copy the speech encoder into the folder.

    Returns:
        Files that were written and their bytes.

    Raises:
        CheckpointError, AlteredModelError, MissingModelError: see `read_trained`.
        RecipeError: an option does not go with the format, or the format cannot express the run; names all reasons.
        DataError: `out` is no new folder, or cannot be written.
    """
    if with_encoder and form != "hf":
        raise RecipeError(f"--with-encoder does not go with --format {form}", fix="leave it out, or export as hf")
    if dtype is not None and form in ("peft", "echox"):
        kind = "float32" if form == "peft" else "float16"
        raise RecipeError(f"--dtype does not go with --format {form}, which is {kind}", fix="leave it out")
    check_free(out)
    trained = read_trained(run)
    with new_folder(out) as folder:
        _write(trained, folder, out, form, _dtype(trained, dtype), with_encoder=with_encoder)
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _write(trained: Trained, folder: Path, out: Path, form: str, dtype: torch.dtype, *, with_encoder: bool) -> None:
    from echox.release.echox_format.exporting import write_release
    from echox.release.llm import write_merged, write_peft
    from echox.release.speech_folder import kept_of, seal, write_parts

    if form == "peft":
        write_peft(trained, folder)
    elif form == "echox":
        write_release(trained, folder)
    else:
        write_merged(trained, folder, dtype)
    if form == "hf":
        write_parts(trained, folder, with_encoder=with_encoder)
        seal(folder, trained.recipe, kept_of(trained))
    write_card(trained, out, folder, form)


def _dtype(trained: Trained, asked: str | None) -> torch.dtype:
    import torch

    from echox.engine.precision import resolve_precision, torch_dtype

    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    computed = trained.manifest.get("precision")
    return torch_dtype("bf16" if computed == "bf16" else resolve_precision(trained.recipe.engine.precision))
