"""Builds a stage at true shapes with random weights made on the device: no folder, no tokenizer, no copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from echox.bench.micro_batch import CORPUS_CLASSES, Vocabulary
from echox.bench.plan.load import template_tokens
from echox.bench.plan.shapes import RANDOM_WORDS
from echox.builders.stages import (
    build_echo_stage,
    build_s2t,
    build_s2t_stage,
    build_t2c,
    build_t2c_stage,
    build_t2c_text,
)
from echox.models.causal_lm import check_parts
from echox.models.t2c import T2CDecoder
from echox.release.pretrained import add_lora, load_causal_lm, load_whisper_encoder
from echox.release.shapes import SHAPES

if TYPE_CHECKING:
    from echox.config.schema import Recipe

_FIRST = 10
"""First id of a template's tokens: what it says does not matter, only how much it is."""
END = 9


def vocabulary_of(recipe: Recipe) -> Vocabulary:
    """A vocabulary of the true size, and a prompt of about the true length."""
    prompt = recipe.model.llm.prompt
    return Vocabulary(
        tokens=SHAPES[recipe.model.llm.path]["vocab_size"],
        words=RANDOM_WORDS,
        before=template(prompt.before or ""),
        after=template(prompt.after or ""),
    )


def template(text: str) -> list[int]:
    """As many ids as the template has tokens."""
    return [_FIRST + place for place in range(template_tokens(text))]


def build(recipe: Recipe, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """What `build_setup` builds of a recipe with `random_init`, but for the tokenizer.

    Args:
        recipe: of a size, see `sizes`.
        device: on which every tensor is made.
        dtype: of all weights.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = recipe.model
    with torch.device(device):
        if recipe.stage == "t2c":
            return _t2c_stage(recipe, dtype)
        causal_lm = load_causal_lm(model.llm.path, dtype, random_init=True)
        table = causal_lm.get_input_embeddings()
        assert model.speech_encoder is not None
        encoder = load_whisper_encoder(model.speech_encoder.path, dtype, random_init=True)
        classes = CORPUS_CLASSES if model.ctc.vocabulary == "corpus" else len(table.weight)
        tokens = torch.tensor([len(table.weight), *range(classes)])
        s2t = build_s2t(model, add_lora(causal_lm, model.llm.lora), causal_lm, encoder, tokens)
        check_parts(causal_lm, model.layout)
        if recipe.stage == "s2t":
            return build_s2t_stage(model, s2t)
        assert model.t2c is not None
        teacher, echo = decoder_of(recipe, table), decoder_of(recipe, table)
        echo.load_state_dict(teacher.state_dict())
        return build_echo_stage(
            model.echo,
            s2t=s2t,
            teacher=teacher,
            echo=echo,
            prefix=template(model.t2c.prefix),
            header=template(model.t2c.unit_header),
            stop_token=_FIRST,
            end_token=END,
            t2c_text=build_t2c_text(model.t2c, table),
        )


def decoder_of(recipe: Recipe, table: nn.Embedding) -> T2CDecoder:
    """A T2C decoder on a text table, in its dtype and on the device of the context."""
    assert recipe.model.t2c is not None
    return build_t2c(recipe.model.t2c, words=RANDOM_WORDS, text_table=table, layout=recipe.model.layout)


def text_table(recipe: Recipe, dtype: torch.dtype, rows: int | None = None) -> nn.Embedding:
    """A random table of the LLM's width, and as many rows as its vocabulary or fewer."""
    shape = SHAPES[recipe.model.llm.path]
    table = nn.Embedding(rows or shape["vocab_size"], shape["hidden_size"], dtype=dtype)
    nn.init.normal_(table.weight, std=0.02)
    return table


def _t2c_stage(recipe: Recipe, dtype: torch.dtype) -> Any:
    """Stage II needs no more of the LLM than its table."""
    t2c = recipe.model.t2c
    assert t2c is not None
    table = text_table(recipe, dtype)
    return build_t2c_stage(
        decoder_of(recipe, table), table, template(t2c.prefix), template(t2c.unit_header), build_t2c_text(t2c, table)
    )
