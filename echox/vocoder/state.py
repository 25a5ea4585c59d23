"""Writes and reads the training state of a vocoder as one checkpoint: both networks, both optimizers, in safetensors.

Every rank holds all of it, so rank 0 alone writes. Folder, manifest and publication are those of all runs
(`echox/engine/checkpoint/manifest.py`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.engine.checkpoint.checkpointer import library_versions
from echox.engine.checkpoint.manifest import (
    CREATED,
    WEIGHTS,
    checkpoints_folder,
    describe_file,
    publish,
    step_name,
    write_manifest,
)
from echox.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from echox.engine.checkpoint.contents import Contents, Manifest
    from echox.vocoder.recipe import VoiceRecipe

PARTS = ("generator", "discriminators")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of all that trains."""
    return ((name, value) for name, value in module.named_parameters() if value.requires_grad)


def capture(modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that a step changes, by name, on the CPU."""
    found: dict[str, Tensor] = {}
    for part in PARTS:
        found |= {f"{part}.{name}": tensor for name, tensor in modules[part].state_dict().items()}
        for name, value in trained(modules[part]):
            state = optimizers[part].state[value]
            found |= {f"optimizer.{part}.{name}.{moment}": state[moment] for moment in _MOMENTS}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def restore(
    checkpoint: Path, step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Put back what `capture` found after `step` steps.

    Raises:
        CheckpointError: the checkpoint holds other tensors than these networks.
    """
    import torch
    from safetensors.torch import load_file

    saved = load_file(checkpoint / WEIGHTS)
    try:
        for part in PARTS:
            prefix = f"{part}."
            state = {name.removeprefix(prefix): each for name, each in saved.items() if name.startswith(prefix)}
            modules[part].load_state_dict(state)
            for name, value in trained(modules[part]):
                moments = {moment: saved[f"optimizer.{part}.{name}.{moment}"] for moment in _MOMENTS}
                kept = {moment: tensor.to(value.device) for moment, tensor in moments.items()}
                optimizers[part].state[value] = {"step": torch.tensor(float(step)), **kept}
    except (RuntimeError, KeyError) as error:
        said = str(error).splitlines()  # torch names the first tensor in its second line
        raise CheckpointError(
            f"the checkpoint holds other tensors than this vocoder: {said[min(1, len(said) - 1)].strip()}",
            where=str(checkpoint),
            fix="continue with the recipe of the run, or use another run name",
        ) from error


def recorded_speakers(checkpoint: Path, manifest: Manifest) -> tuple[str, ...]:
    """Names of the speakers that a run began with, in the order of their rows; none for one voice.

    Raises:
        CheckpointError: what the manifest has in their place are no names.
    """
    names: Any = manifest.get("speakers", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("its speakers are no list of names", where=str(checkpoint), fix="restore its manifest")
    return tuple(names)


def save(
    run_folder: Path,
    recipe: VoiceRecipe,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    attempt: int,
    world_size: int,
    stream: Mapping[str, Any],
    metrics: Mapping[str, float],
    speakers: Sequence[str] = (),
) -> Path:
    """Write and publish the checkpoint after `step` steps; returns its folder.

    `speakers` are the names behind the rows of the table of speakers, none for one voice.

    Raises:
        CheckpointError: it cannot be written; earlier ones are untouched.
    """
    from safetensors.torch import save_file

    final = checkpoints_folder(run_folder) / step_name(step)
    temporary = final.with_name(f".attempt-{attempt}-{final.name}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary / WEIGHTS)
        weights = {name: each for name, each in tensors.items() if name.startswith(PARTS)}
        contents: Contents = {
            "run": recipe.name,
            "stage": recipe.stage,
            "recipe": recipe.model_dump(mode="json"),
            "frozen": {},
            "dtypes": {"trainable": {"float32": sum(each.numel() for each in weights.values())}},
            "precision": "fp32",
            "step": step,
            "updates": step,
            "attempt": attempt,
            "world_size": world_size,
            "created": time.strftime(CREATED, time.gmtime()),
            "cursor": {"step": step, "stream": stream, "health": {"losses": [], "known": 0, "bad_steps": 0}},
            "metrics": dict(metrics),
            "trainable": {
                name: {"shape": list(each.shape), "dtype": str(each.dtype)} for name, each in weights.items()
            },
            "versions": library_versions(),
        }
        if speakers:
            contents["speakers"] = list(speakers)
        write_manifest(temporary, contents, {WEIGHTS: describe_file(temporary / WEIGHTS)})
        publish(temporary, final)
    except Exception as error:  # a full disk comes out of safetensors as an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(final),
            fix="earlier checkpoints are untouched; make room or restore access, then start the run again",
        ) from error
    return final
