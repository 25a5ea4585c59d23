"""Reads from modules the sizes that the cost of a step is computed from (`echox/models/flops.py`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from echox.models.causal_lm import decoder_layers
from echox.models.flops import EncoderSize, LlmSize, SpeechSize, T2cSize
from echox.models.s2t import S2TModel
from echox.models.t2c import T2CDecoder

_READING = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""Maps that read the input of a layer, as model families call them."""


def llm_size(causal_lm: Any) -> LlmSize:
    """Of a causal LM, below PEFT where it has LoRA; a mixture of experts counts as if all of them were asked."""
    config = causal_lm.config
    layers = decoder_layers(causal_lm)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    lora = _linear(layers, lambda name: "lora_" in name)
    return LlmSize(
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        linear=_linear(layers) - lora,
        lora=lora,
        attention=len(layers) * heads * head_width,
        reading=_linear(layers[0], _reads_input),
    )


def speech_size(s2t: S2TModel, *, encodes: bool) -> SpeechSize:
    """Of the front end and what it hands to the LLM; `encodes`: the speech encoder runs in training."""
    front_end = s2t.front_end
    encoder = front_end.encoder.encoder
    alignment = front_end.alignment
    size = None
    if encodes:
        width = front_end.encoder.width
        mels = encoder.conv1.in_channels
        size = EncoderSize(mels, width, _linear(encoder.layers), len(encoder.layers) * width)
    first: Any = alignment.block.ffn[0]
    return SpeechSize(
        encoder=size,
        stacked=alignment.projection.in_features,
        width=alignment.projection.out_features,
        ffn=first.out_features,
        classes=front_end.ctc_head.linear.out_features,
        all_keys=not front_end.shrink.kept_keys_only,
        ctc_embedding=s2t.ctc_embedding,
    )


def t2c_size(decoder: T2CDecoder) -> T2cSize:
    """Of a T2C or Echo decoder."""
    body: Any = decoder.body
    width = decoder.projection.out_features
    layers = len(body.layers)
    return T2cSize(
        decoder.projection.in_features, width, _linear(body.layers), layers * width, decoder.head.out_features
    )


def trains(module: nn.Module) -> bool:
    """Whether any of its weights does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _reads_input(name: str) -> bool:
    if "lora_B" in name:
        return False
    return any(part in _READING for part in name.split("."))


def _linear(module: nn.Module, wanted: Any = None) -> int:
    """Weights in linear maps, from what the maps say of themselves: under ZeRO-3 their tensors are empty."""
    from transformers.pytorch_utils import Conv1D

    total = 0
    for name, part in module.named_modules():
        if wanted is not None and not wanted(name):
            continue
        if isinstance(part, nn.Linear):
            total += part.in_features * part.out_features
        elif isinstance(part, Conv1D):
            total += part.nx * part.nf
    return total
