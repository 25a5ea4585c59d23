"""Loads pretrained parts (causal LM with LoRA, Whisper encoder, tokenizer) or their shapes on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import resolve_model
from echox.errors import MissingModelError, RecipeError
from echox.release.shapes import SHAPES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from echox.config.model_schema import LoraConfig


def load_causal_lm(ref: str, dtype: torch.dtype, *, random_init: bool = False) -> Any:
    """A Hugging Face causal LM, frozen, in `dtype`, with SDPA where its class has it and eager attention elsewhere.

    Raises:
        MissingModelError: no such folder, or the folder lacks files.
        RecipeError: the folder holds no causal LM of text.
    """
    from transformers import AutoModelForCausalLM

    config = _config(ref)
    attention = "sdpa" if _causal_lm_class(ref, config)._supports_sdpa else "eager"
    if random_init:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(ref), dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False)


def load_whisper_encoder(ref: str, dtype: torch.dtype, *, random_init: bool = False) -> Any:
    """The encoder of a Hugging Face Whisper model, frozen, in `dtype`; the decoder is dropped."""
    import torch
    from transformers import WhisperModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    if random_init:
        encoder = WhisperEncoder._from_config(_config(ref), dtype=dtype, attn_implementation="sdpa")
    else:
        encoder = WhisperModel.from_pretrained(resolve_model(ref), dtype=dtype, attn_implementation="sdpa").encoder
    with torch.no_grad():
        return encoder.requires_grad_(False).eval()


def load_tokenizer(ref: str, *, random_init: bool = False) -> Any:
    """The LLM's tokenizer; for a random model without a folder, a byte-level one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(resolve_model(ref, weights=not random_init))
    except MissingModelError:
        if not (random_init and ref in SHAPES):
            raise
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def add_lora(llm: Any, config: LoraConfig) -> nn.Module:
    """Wrap the causal LM with trainable low-rank adapters of the LLM's own dtype (U6), named as PEFT names them.

    Raises:
        RecipeError: a target is missing in a decoder layer, or cannot have an adapter.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=lora_targets(llm, config.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        wrapped: nn.Module = get_peft_model(llm, peft_config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(f"model.llm.lora.targets cannot all be adapted: {error}", fix="name others") from error
    dtype = next(llm.parameters()).dtype
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fuse_lora(wrapped)
    return wrapped


def fuse_lora(wrapped: nn.Module) -> None:
    """Let PEFT's layers over linear maps compute as `echox.models.lora` does; tensors, names and files stay PEFT's.

    Layers that are more than a plain update of a plain map compute as before.
    """
    from peft.tuners.lora.layer import Linear
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from echox.models.lora import ADAPTER, FusedForward, share_inputs

    class FusedLinear(FusedForward, Linear):
        """PEFT's layer with our forward."""

    child: Any
    for parent in list(wrapped.modules()):
        for child in parent.children():
            plain = type(child) is Linear and type(child.base_layer) in (nn.Linear, Conv1D)
            if (
                plain
                and list(child.lora_A) == [ADAPTER]
                and not child.lora_variant
                and not any(child.lora_bias.values())
            ):
                child.__class__ = FusedLinear
        share_inputs(parent)


def lora_targets(llm: Any, targets: Sequence[str]) -> list[str]:
    """Names of the linear maps that get an adapter; `auto` stands for every one that the decoder layers have.

    Raises:
        RecipeError: some names match no linear map in one or more decoder layers; lists them and what the layers have.
    """
    from echox.models.causal_lm import decoder_layers

    layers = decoder_layers(llm)
    maps = [_linear_maps(layer) for layer in layers]
    there = list(dict.fromkeys(name.rpartition(".")[2] for layer in layers for name in _linear_maps(layer, plain=True)))
    if list(targets) == ["auto"]:
        return there
    counts = {target: sum(any(_matches(name, target) for name in layer) for layer in maps) for target in targets}
    missing = [
        f"{target} in {count or 'none'} of {len(maps)} layers" for target, count in counts.items() if count < len(maps)
    ]
    if missing:
        everywhere = [name for name in there if all(any(_matches(m, name) for m in layer) for layer in maps)]
        raise RecipeError(
            f"model.llm.lora.targets does not match every layer of {type(llm).__name__}: {', '.join(missing)}",
            fix=f"its layers have {', '.join(there)}: set the key to [{', '.join(everywhere)}], or to auto",
        )
    return list(targets)


def _linear_maps(layer: nn.Module, *, plain: bool = False) -> list[str]:
    """Names within the layer; `plain` leaves out what only inherits from a linear map, such as routers of experts."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return [name for name, part in layer.named_modules() if (type(part) in kinds if plain else isinstance(part, kinds))]


def _matches(name: str, target: str) -> bool:
    """Whether PEFT takes the module for the target."""
    return name == target or name.endswith(f".{target}")


def model_folder(ref: str, *, random_init: bool) -> Path | None:
    """Folder behind a reference, for the identity of frozen weights; None for random ones."""
    return None if random_init else resolve_model(ref)


def _causal_lm_class(ref: str, config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "no causal LM that transformers has a class for"
    elif config.get_text_config() is not config:
        kind = "multimodal"
    elif getattr(config, "is_encoder_decoder", False):
        kind = "an encoder with a decoder"
    if kind:
        raise RecipeError(f"model.llm.path: {ref} ({config.model_type}) is {kind}", fix="use a causal LM of text alone")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _config(ref: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(ref, weights=False))
    except MissingModelError:
        if ref not in SHAPES:
            raise
    shape = dict(SHAPES[ref])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def mel_bins(ref: str, *, random_init: bool) -> int:
    """Mel bands the Whisper model was trained on: 80, or 128 since large-v3."""
    return int(_config(ref).num_mel_bins)


def encoder_width(ref: str) -> int:
    """Width of the Whisper model's features."""
    return int(_config(ref).d_model)
