"""Stages with the layers of the published models and tiny widths: kernels and syncs do not depend on widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from echox.builders.stages import build_echo_stage, build_s2t, build_s2t_stage, build_t2c
from echox.config.load import load_recipe
from echox.config.model_schema import ModelConfig
from echox.models.s2t import S2TModel
from echox.release.pretrained import add_lora
from echox.stages.echo import EchoStage
from echox.stages.s2t import S2TStage
from echox.stream.batch import SpeechBatch
from tests import tiny

LAYERS = {"3b": 28, "8b": 32}
ENCODER_LAYERS = 32


def config_of(scale: str, stage: str, *, dropout: bool = True, **echo: Any) -> ModelConfig:
    """The recipe's model at tiny widths."""
    model = load_recipe(f"{scale}/{stage}").model.model_dump(mode="json")
    model["llm"]["lora"] |= {"r": 4} | ({} if dropout else {"dropout": 0.0})
    model["alignment"] |= {"heads": 4}
    model["shrink"] |= {"heads": 4}
    if model.get("t2c"):
        model["t2c"] |= {"width": 16, "heads": 2, "ffn": 32, "max_positions": 512}
    model["echo"] |= echo
    return ModelConfig.model_validate(model)


def s2t_model(config: ModelConfig, layers: int) -> S2TModel:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval().requires_grad_(False)  # fmt: skip
    encoder = WhisperEncoder(
        WhisperConfig(
            d_model=16, encoder_layers=ENCODER_LAYERS, encoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_layers=1, decoder_attention_heads=2, num_mel_bins=8, attn_implementation="sdpa",
        )
    ).eval().requires_grad_(False)  # fmt: skip
    tokens = torch.tensor([tiny.VOCABULARY, *range(tiny.VOCABULARY)])
    return build_s2t(config, add_lora(llm, config.llm.lora), llm, encoder, tokens)


def s2t_stage(scale: str = "3b", *, layers: int | None = None) -> S2TStage:
    config = config_of(scale, "s2t")
    config = config.model_copy(update={"ctc": config.ctc.model_copy(update={"align_steps": 0})})
    return build_s2t_stage(config, s2t_model(config, layers or LAYERS[scale]))


def echo_stage(scale: str = "3b", *, layers: int | None = None, **echo: Any) -> EchoStage:
    config = config_of(scale, "echo", **echo)
    assert config.t2c is not None
    table = nn.Embedding(tiny.VOCABULARY, 32)
    teacher, student = (build_t2c(config.t2c, words=tiny.WORDS, text_table=table) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    return build_echo_stage(
        config.echo, s2t=s2t_model(config, layers or LAYERS[scale]), teacher=teacher, echo=student,
        prefix=tiny.PREFIX, header=tiny.HEADER, stop_token=11, end_token=tiny.END,
    )  # fmt: skip


def batch_of(rows: int = 16, *, answer: int = 55) -> SpeechBatch:
    """Questions of up to two seconds, and own answers of up to `answer` tokens."""
    batch = tiny.speech_batch(rows)
    lengths_B = torch.tensor([answer - 2 * (row % 8) for row in range(rows)])
    batch.own_mask_BR = torch.arange(answer) < lengths_B[:, None]
    batch.own_BR = torch.randint(12, tiny.VOCABULARY, (rows, answer), generator=torch.Generator().manual_seed(1))
    return batch.to("cpu")
