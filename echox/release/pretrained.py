"""Loads pretrained parts (causal LM with LoRA, Whisper encoder, tokenizer) or their shapes on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import resolve_model
from echox.errors import MissingModelError
from echox.release.shapes import SHAPES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from echox.config.model_schema import LoraConfig


def load_causal_lm(ref: str, dtype: torch.dtype, *, random_init: bool = False) -> Any:
    """A Hugging Face causal LM, frozen, in `dtype`.

    Raises:
        MissingModelError: no such folder, or the folder lacks files.
    """
    from transformers import AutoModelForCausalLM

    if random_init:
        model = AutoModelForCausalLM.from_config(_config(ref), dtype=dtype, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(ref), dtype=dtype, attn_implementation="sdpa")
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
    """Wrap the causal LM with trainable low-rank adapters of the LLM's own dtype (U6)."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    wrapped: nn.Module = get_peft_model(
        llm,
        PeftLoraConfig(
            r=config.r,
            lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            bias="none",
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    dtype = next(llm.parameters()).dtype
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def model_folder(ref: str, *, random_init: bool) -> Path | None:
    """Folder behind a reference, for the identity of frozen weights; None for random ones."""
    return None if random_init else resolve_model(ref)


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
