"""Exports the language model of a run: its LoRA as a plain PEFT folder, or the LLM with the LoRA merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.errors import CheckpointError
from echox.models.lora import ADAPTER
from echox.release.pretrained import add_lora, load_causal_lm, load_tokenizer
from echox.release.trained import LORA, Trained

if TYPE_CHECKING:
    import torch


def write_peft(trained: Trained, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT itself does.

    Raises:
        CheckpointError: the run has no LoRA, or one of other maps than its recipe names.
    """
    import torch

    with torch.device("meta"):
        wrapped: Any = _with_update(trained, torch.float32, random_init=True)
    wrapped.peft_config[ADAPTER].base_model_name_or_path = trained.recipe.model.llm.path
    # Whether the LLM's vocabulary grew need not be asked of a hub: no table is trained here.
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, with blanks to fill in


def write_merged(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write the LLM with its update, as an ordinary Hugging Face folder with its tokenizer.

    Raises:
        CheckpointError: see `write_peft`.
    """
    merged_llm(trained, dtype).save_pretrained(folder)
    load_tokenizer(trained.recipe.model.llm.path).save_pretrained(folder)


def merged_llm(trained: Trained, dtype: torch.dtype) -> Any:
    """The causal LM in `dtype` with its update merged: sums are computed in float32 and rounded once.

    Raises:
        CheckpointError: see `write_peft`.
    """
    import torch

    if trained.exported:
        return load_causal_lm(trained.recipe.model.llm.path, dtype)
    wrapped: Any = _with_update(trained, dtype)
    with torch.no_grad():
        for layer in wrapped.modules():
            if getattr(layer, "lora_A", None):
                weight = layer.get_base_layer().weight
                weight.copy_((weight.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype))
    return wrapped.unload()


def _with_update(trained: Trained, dtype: torch.dtype, *, random_init: bool = False) -> Any:
    """The LLM in `dtype` with the trained LoRA beside it in float32."""
    import torch

    if trained.exported:
        fix = "its own files are those of the merged LLM already"
        raise CheckpointError("an exported folder has no LoRA", where=str(trained.checkpoint), fix=fix)
    model = trained.recipe.model
    wrapped: Any = add_lora(load_causal_lm(model.llm.path, dtype, random_init=random_init), model.llm.lora)
    places = {name: each for name, each in wrapped.named_parameters() if LORA in name}
    update = trained.lora
    differing = sorted(
        name
        for name in places.keys() | update.keys()
        if name not in places or name not in update or places[name].shape != update[name].shape
    )
    if differing:
        raise CheckpointError(
            f"the LoRA of the run is not the one that its recipe builds: {', '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}",
            where=str(trained.checkpoint),
            fix="put the LLM of the run back",
        )
    for name in places:
        owner, _, last = name.rpartition(".")
        value = torch.nn.Parameter(update[name].to("cpu", torch.float32), requires_grad=False)
        setattr(wrapped.get_submodule(owner), last, value)
    return wrapped
