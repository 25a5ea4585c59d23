"""Names everything about a run that the released format and its code cannot express."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from echox.config.model_schema import ModelConfig
from echox.config.schema import Recipe
from echox.release.echox_format import parity
from echox.release.echox_format.names import CTC_TOKENS
from echox.release.echox_format.shape import LARGE, LLAMA_3, MEDIUM, SMALL, T2cShape, t2c_shape
from echox.release.echox_format.vocabulary import fixed_problems
from echox.release.trained import Trained
from echox.units.language import UnitLanguage
from echox.units.pieces import RELEASED_UNITS


def reasons(trained: Trained, llm: dict[str, Any], tokenizer: Any, language: UnitLanguage | None) -> list[str]:
    """Why a run cannot be exported; empty where it can.

    Args:
        trained: the run.
        llm: `config.json` of its LLM.
        tokenizer: `tokenizers.Tokenizer` of its LLM.
        language: its unit language.
    """
    recipe = trained.recipe
    if recipe.stage != "echo":
        return [f"stage={recipe.stage}: a release is a model of stage echo"]
    return [
        *_llm(llm),
        *_hearing(recipe.model, llm),
        *_ctc(trained),
        *_speaking(recipe.model, llm),
        *_templates(recipe),
        *fixed_problems(tokenizer),
        *_units(language),
    ]


def unit_model(shape: T2cShape, llm: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether the released code builds a T2C of these sizes, and the value of `unit_model` with which it does."""
    sizes = llm["hidden_size"], llm["num_attention_heads"], llm["num_key_value_heads"], llm["intermediate_size"]
    for name in (None, SMALL, MEDIUM, LARGE):
        if t2c_shape(name, *sizes) == shape:
            return True, name
    return False, None


def _llm(llm: dict[str, Any]) -> Iterator[str]:
    if llm.get("model_type") != "llama":
        yield f"the LLM is a {llm.get('model_type')}; the released code is a Llama"
    for name in ("attention_bias", "mlp_bias"):
        if llm.get(name):
            yield f"the LLM has {name}, which the released code has not"
    if llm.get("vocab_size") not in (LLAMA_3, LLAMA_3 + 1):
        yield f"the LLM has {llm.get('vocab_size')} tokens, not Llama 3's {LLAMA_3}"


def _hearing(model: ModelConfig, llm: dict[str, Any]) -> Iterator[str]:
    speech, alignment, shrink = model.speech_encoder, model.alignment, model.shrink
    heads = llm.get("num_attention_heads")
    if speech is None or speech.input != "all_30s":
        shown = None if speech is None else speech.input
        yield f"model.speech_encoder.input={shown}: the released code hears all of 30 s (all_30s)"
    if alignment.attention != "frame_local":
        yield f"model.alignment.attention={alignment.attention}: the released code's is frame_local"
    if alignment.stack != 2 or alignment.ffn_multiple != 2:
        yield (
            f"model.alignment.stack={alignment.stack} and ffn_multiple={alignment.ffn_multiple:g}: "
            "the released code's are 2 and 2"
        )
    for section in ("alignment", "shrink"):
        own = getattr(model, section).heads
        if own not in (None, heads):
            yield f"model.{section}.heads={own}: the released code takes the LLM's {heads}"
    if shrink.keys != "kept":
        yield f"model.shrink.keys={shrink.keys}: the released code looks back at kept frames"
    if shrink.blanks != "keep":
        yield f"model.shrink.blanks={shrink.blanks}: the released code keeps them"
    if shrink.ctc_embedding:
        yield "model.shrink.ctc_embedding=true: the released code adds none"


def _ctc(trained: Trained) -> Iterator[str]:
    """Classes must be the tokens of Llama 3 with the placeholder, which is number 128,256, as the blank."""
    tokens = trained.tensors.get(CTC_TOKENS)
    wanted = [LLAMA_3, *range(LLAMA_3)]
    if tokens is None or tokens.tolist() != wanted:
        count = "no" if tokens is None else f"{len(tokens):,}"
        yield (
            f"model.ctc.vocabulary={trained.recipe.model.ctc.vocabulary} made {count} classes: the released code has "
            f"Llama 3's {LLAMA_3:,} tokens and the placeholder"
        )


def _speaking(model: ModelConfig, llm: dict[str, Any]) -> Iterator[str]:
    t2c, echo = model.t2c, model.echo
    assert t2c is not None
    shape = T2cShape(t2c.layers, t2c.width, t2c.heads, t2c.heads, t2c.ffn)
    if not unit_model(shape, llm)[0]:
        yield (
            f"model.t2c: {t2c.layers} layers of width {t2c.width}, {t2c.heads} heads, ffn {t2c.ffn}: the released code "
            "builds 6 or 4 of 512 with 8 heads, 8 of 768 with 12 (ffn 2048), or 2 of the LLM's sizes"
        )
    if t2c.body != "llm":
        yield "model.t2c.body=null: the released T2C has the LLM's rotary embedding and norm epsilon (llm)"
    for name in ("text_stride", "units_per_character", "window_units"):
        if getattr(t2c, name) is not None:
            yield f"model.t2c.{name}={getattr(t2c, name):g}: the released code counts positions on"
    if t2c.text_embeddings != "raw":
        yield f"model.t2c.text_embeddings={t2c.text_embeddings}: the released code takes them raw"
    if echo.denoising.ffn not in (None, llm.get("intermediate_size")):
        yield f"model.echo.denoising.ffn={echo.denoising.ffn}: the released code takes the LLM's"
    if echo.state != "predicting":
        yield f"model.echo.state={echo.state}: the released code speaks from the state that predicts a token"
    cut = echo.segmentation
    if any(getattr(cut, name) != value for name, value in parity.SEGMENTS.items()):
        yield "model.echo.segmentation: the released code cuts by the trigger with 20, 50, 0.1 and 5"


def _templates(recipe: Recipe) -> Iterator[str]:
    prompt, t2c = recipe.model.llm.prompt, recipe.model.t2c
    assert t2c is not None
    first, last = parity.before("\0").split("\0")
    before = prompt.before or ""
    given = {
        "model.llm.prompt.before": before.startswith(first) and before.endswith(last),
        "model.llm.prompt.after": prompt.after == parity.AFTER,
        "model.llm.prompt.end": prompt.end == parity.END,
        "model.llm.prompt.begin": prompt.begin == parity.B,
        "model.llm.prompt.unseen": prompt.unseen == parity.END,
        "model.t2c.prefix": t2c.prefix == parity.PREFIX,
        "model.t2c.unit_header": t2c.unit_header in (parity.UNIT_HEADER, parity.SPOKEN_HEADER),
    }
    wrong = [key for key, fits in given.items() if not fits]
    if wrong:
        yield f"{', '.join(wrong)}: not the templates of the released code, with which the model would be asked"


def _units(language: UnitLanguage | None) -> Iterator[str]:
    if language is not None and language.n_units > RELEASED_UNITS:
        yield f"{language.n_units} units: the released code drops those from {RELEASED_UNITS} on"
