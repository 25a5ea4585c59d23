"""Builds the networks of each stage from recipe sections and pretrained parts; sizes come from the parts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from echox.models.echo import DenoisingAdapter
from echox.models.ragged import Layout
from echox.models.s2t import S2TModel
from echox.models.speech import AlignmentAdapter, CtcHead, ShrinkAdapter, SpeechFrontEnd, TrimmedWhisperEncoder
from echox.models.t2c import T2CDecoder
from echox.models.t2c_text import T2CText
from echox.stages.echo import EchoStage
from echox.stages.s2t import S2TStage
from echox.stages.t2c import T2CStage

if TYPE_CHECKING:
    from echox.config.model_schema import EchoConfig, ModelConfig, T2cConfig


def build_s2t(
    model: ModelConfig,
    llm: nn.Module,
    causal_lm: Any,
    encoder: Any,
    ctc_tokens: Tensor,
    *,
    unseen: int | None = None,
) -> S2TModel:
    """Front end around a Whisper encoder, spliced into `llm` (PEFT-wrapped or plain; `causal_lm` is what it wraps).

    `unseen`: token that nothing attends to in a prompt.
    """
    config = causal_lm.config
    width, heads = config.hidden_size, config.num_attention_heads
    table = causal_lm.get_input_embeddings().weight
    assert model.speech_encoder is not None
    whisper = TrimmedWhisperEncoder(encoder, model.layout, input_mode=model.speech_encoder.input)
    alignment = AlignmentAdapter(
        encoder_width=whisper.width,
        width=width,
        heads=model.alignment.heads or heads,
        ffn=int(width * model.alignment.ffn_multiple),
        stack=model.alignment.stack,
        dropout=model.alignment.dropout,
        frame_local=model.alignment.attention == "frame_local",
        layout=model.layout,
    )
    ctc_head = CtcHead(width, ctc_tokens, len(table))
    shrink = ShrinkAdapter(
        width=width,
        heads=model.shrink.heads or heads,
        dropout=model.shrink.dropout,
        kept_keys_only=model.shrink.keys == "kept",
        drop_blanks=model.shrink.blanks == "drop",
    )
    if table.device.type != "meta":
        if model.ctc.init_from_llm:
            ctc_head.init_from_table(table)
        # Speech vectors start at the scale of text ones; beside CTC's embeddings, which have it already, at nothing.
        nn.init.constant_(shrink.norm.weight, 0.0 if model.shrink.ctc_embedding else float(rms(table)))
    front_end = SpeechFrontEnd(whisper, alignment, ctc_head, shrink).to(table.dtype)
    return S2TModel(front_end, llm, ctc_embedding=model.shrink.ctc_embedding, unseen_token=unseen, layout=model.layout)


def build_t2c(
    config: T2cConfig,
    *,
    words: int,
    text_table: nn.Embedding,
    layout: Layout = "packed",
    word_units: Sequence[int] = (),
    llm: Any = None,
) -> T2CDecoder:
    """A T2C or Echo decoder for `words` unit-language words, of `word_units` units each, on the LLM's text table.

    `llm`: the LLM's configuration, which `body: llm` asks for.
    """
    table = text_table.weight
    decoder = T2CDecoder(
        words=words,
        text_width=table.shape[1],
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        ffn=config.ffn,
        max_positions=config.max_positions,
        dropout=config.dropout,
        text_classes=len(table) if config.head == "full_vocab" else 0,
        text_stride=config.text_stride,
        units_per_character=config.units_per_character,
        word_units=word_units,
        history_dropout=config.history_dropout,
        window_units=config.window_units,
        body=llama_body(llm) if config.body == "llm" else None,
        layout=layout,
    )
    if table.device.type != "meta":
        decoder.scale_units(1.0 if config.text_embeddings == "centred" else float(rms(table)))
    return decoder.to(table.dtype)


def llama_body(llm: Any) -> dict[str, Any]:
    """What a decoder takes from the LLM's configuration: rotary embedding, as far as it reaches, and norm epsilon."""
    return {
        "rope_parameters": dict(llm.rope_parameters),
        "rms_norm_eps": llm.rms_norm_eps,
        "max_position_embeddings": llm.max_position_embeddings,
    }


def build_t2c_text(
    config: T2cConfig,
    text_table: nn.Embedding,
    characters: Sequence[int] | None = None,
    head_Vh: Tensor | None = None,
) -> T2CText:
    """How text is given to the decoders of a recipe.

    Args:
        config: of the decoders.
        text_table: the LLM's input table.
        characters: of each token, where text is placed by them.
        head_Vh: weight of the LLM's head.
    """
    table_Vh, own_Vh = text_table.weight, None
    if config.text_table == "head":
        assert head_Vh is not None
        table_Vh = own_Vh = head_Vh.detach()
    elif config.text_table == "own":
        own_Vh = torch.zeros_like(table_Vh)  # until it is loaded
    return T2CText(table_Vh if config.text_embeddings == "centred" else None, characters, own_Vh)


def build_s2t_stage(model: ModelConfig, s2t: S2TModel) -> S2TStage:
    """Stage I."""
    return S2TStage(model.ctc, s2t)


def build_t2c_stage(
    decoder: T2CDecoder,
    text_table: nn.Embedding,
    prefix: list[int],
    header: list[int],
    t2c_text: T2CText | None = None,
) -> T2CStage:
    """Stage II on a frozen text table."""
    text_table.requires_grad_(False)
    return T2CStage(decoder, text_table, torch.tensor(prefix), torch.tensor(header), t2c_text)


def build_echo_stage(
    config: EchoConfig,
    *,
    s2t: S2TModel,
    teacher: T2CDecoder,
    echo: T2CDecoder,
    prefix: list[int],
    header: list[int],
    stop_token: int,
    end_token: int,
    t2c_text: T2CText | None = None,
) -> EchoStage:
    """Stage III; freezes the speech adapters unless the recipe trains them."""
    causal_lm = s2t.causal_lm
    width = causal_lm.config.hidden_size
    denoising = DenoisingAdapter(
        width, config.denoising.ffn or causal_lm.config.intermediate_size, config.denoising.dropout
    ).to(next(echo.parameters()).dtype)
    adapters = (s2t.front_end.alignment, s2t.front_end.ctc_head, s2t.front_end.shrink)
    for adapter in adapters:
        adapter.requires_grad_(config.train_speech_adapters)
    # Without CTC no loss reads its logits here: the head only shrinks.
    s2t.front_end.ctc_head.requires_grad_(config.ctc_weight > 0)
    return EchoStage(
        config,
        s2t=s2t,
        teacher=teacher,
        echo=echo,
        denoising=denoising,
        prefix_P=torch.tensor(prefix),
        header_Q=torch.tensor(header),
        stop_row_h=causal_lm.get_output_embeddings().weight[stop_token].detach().clone(),
        end_token=end_token,
        t2c_text=t2c_text,
    )


def rms(table: Tensor) -> Tensor:
    """Root mean square of a table's elements."""
    return table.detach().float().pow(2).mean().sqrt()
