"""Lists the tensors and sizes of a recipe's stage from published shapes or a model folder's config, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from echox.config.paths import resolve_data_file, resolve_model
from echox.errors import DataError, MissingModelError, RecipeError
from echox.models.flops import EncoderSize, LlmSize, SpeechSize, T2cSize
from echox.release.shapes import SHAPES

if TYPE_CHECKING:
    from echox.config.schema import Recipe

LLAMA_LIKE = ("llama", "mistral")
"""Model types whose layers have seven linear maps without bias and two norms."""
RANDOM_WORDS = 7500
"""Words of a unit language that is not there yet."""
CORPUS_CLASSES = 1000
"""CTC classes of `vocabulary: corpus` where the transcripts are not read."""


class Llm(NamedTuple):
    """Shape of a causal LM."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool

    def maps(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear maps of a layer."""
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "q_proj": (self.width, inner),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (inner, self.width),
            "gate_proj": (self.width, self.ffn),
            "up_proj": (self.width, self.ffn),
            "down_proj": (self.ffn, self.width),
        }


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """What a stage is made of.

    Attributes:
        llm, llm_size: of the LLM; in Stage II only its text table is there.
        speech: of the front end; None in Stage II.
        encoder_layers: of the speech encoder.
        t2c, t2c_layers: of the T2C or Echo decoder; None in Stage I.
        denoising: hidden width of the Denoising Adapter, 0 without one.
        frozen, trainable: elements of each parameter tensor.
        flats: parameters that hold all that trains, one a learning rate for matrices and one for vectors.
    """

    llm: Llm
    llm_size: LlmSize
    speech: SpeechSize | None
    encoder_layers: int
    t2c: T2cSize | None
    t2c_layers: int
    denoising: int
    frozen: tuple[int, ...]
    trainable: tuple[int, ...]
    flats: int


def stage_shape(recipe: Recipe) -> StageShape:
    """Sizes and tensors of the recipe's stage.

    Raises:
        MissingModelError: a model is neither in its folder nor among the published shapes.
        RecipeError: the LLM is not built like Llama.
    """
    model, stage = recipe.model, recipe.stage
    llm = _llm(model.llm.path)
    table = llm.vocabulary * llm.width
    lora = _lora(llm, model.llm.lora)
    frozen: list[int] = [table]
    trainable: list[int] = []
    speech: SpeechSize | None = None
    t2c: T2cSize | None = None
    encoder_layers, t2c_layers, denoising = 0, 0, 0
    if stage != "t2c":
        frozen += _llm_tensors(llm)
        trainable += [size for sizes in lora.values() for pair in sizes for size in pair] * llm.layers
        speech, encoder_layers, tower, adapters, ctc_head = _speech(recipe, llm)
        frozen += tower
        echo = model.echo
        (trainable if stage == "s2t" or echo.train_speech_adapters else frozen).extend(adapters)
        (trainable if stage == "s2t" or echo.ctc_weight > 0 else frozen).append(ctc_head)
    if stage != "s2t":
        t2c, t2c_layers, decoder = _t2c(recipe, llm)
        trainable += decoder
        if stage == "echo":
            frozen += decoder  # the teacher
            denoising = model.echo.denoising.ffn or llm.ffn
            trainable += [llm.width * denoising, denoising, denoising * llm.width, llm.width]
    return StageShape(
        llm=llm,
        llm_size=_llm_size(llm, lora),
        speech=speech,
        encoder_layers=encoder_layers,
        t2c=t2c,
        t2c_layers=t2c_layers,
        denoising=denoising,
        frozen=tuple(frozen),
        trainable=tuple(trainable),
        flats=_flats(recipe),
    )


def _flats(recipe: Recipe) -> int:
    """LoRA and the CTC head have no vectors; the adapters, the denoising adapter and the decoders have both."""
    if recipe.stage == "t2c":
        return 2
    echo = recipe.model.echo
    adapters = 2 if recipe.stage == "s2t" or echo.train_speech_adapters else int(echo.ctc_weight > 0)
    return 1 + adapters + (4 if recipe.stage == "echo" else 0)


def _config(ref: str) -> dict[str, Any]:
    """config.json of the model's folder, or its published shape."""
    try:
        return dict(json.loads((resolve_model(ref, weights=False) / "config.json").read_text(encoding="utf-8")))
    except (MissingModelError, FileNotFoundError):
        if ref not in SHAPES:
            raise
    return dict(SHAPES[ref])


def _llm(ref: str) -> Llm:
    config = _config(ref)
    if config.get("model_type") not in LLAMA_LIKE:
        raise RecipeError(
            f"model.llm.path: {ref} is of type {config.get('model_type')}, and shapes are planned for "
            f"{' and '.join(LLAMA_LIKE)} alone",
            fix="measure it with `echox bench step` on the hardware",
        )
    heads = int(config["num_attention_heads"])
    return Llm(
        layers=int(config["num_hidden_layers"]),
        width=int(config["hidden_size"]),
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _llm_tensors(llm: Llm) -> list[int]:
    """Everything but the text table."""
    layer = [inputs * outputs for inputs, outputs in llm.maps().values()] + [llm.width] * 2
    head = [] if llm.tied else [llm.vocabulary * llm.width]
    return [*layer * llm.layers, llm.width, *head]


def _lora(llm: Llm, config: Any) -> dict[str, list[tuple[int, int]]]:
    """Elements of A and B of each adapted map of a layer."""
    maps = llm.maps()
    names = maps if list(config.targets) == ["auto"] else [name for name in maps if name in config.targets]
    return {name: [(config.r * maps[name][0], config.r * maps[name][1])] for name in names}


def _llm_size(llm: Llm, lora: dict[str, list[tuple[int, int]]]) -> LlmSize:
    maps = llm.maps()
    return LlmSize(
        width=llm.width,
        vocabulary=llm.vocabulary,
        linear=llm.layers * sum(inputs * outputs for inputs, outputs in maps.values()),
        lora=llm.layers * sum(a + b for pairs in lora.values() for a, b in pairs),
        attention=llm.layers * llm.heads * llm.head_width,
        reading=sum(
            maps[name][0] * maps[name][1] + sum(a for a, _ in lora.get(name, []))
            for name in ("q_proj", "k_proj", "v_proj")
        ),
    )


def _speech(recipe: Recipe, llm: Llm) -> tuple[SpeechSize, int, list[int], list[int], int]:
    """Size, layers of the encoder, tensors of the encoder, those of both adapters, the CTC head."""
    model = recipe.model
    assert model.speech_encoder is not None
    config = _config(model.speech_encoder.path)
    d, mels, ffn = int(config["d_model"]), int(config["num_mel_bins"]), int(config["encoder_ffn_dim"])
    layers, h = int(config["encoder_layers"]), llm.width
    attention = [d * d] * 4 + [d] * 3  # the key has no bias
    layer = [*attention, d, d, d * ffn, ffn, ffn * d, d, d, d]
    tower = [3 * mels * d, d, 3 * d * d, d, int(config.get("max_source_positions", 1500)) * d, *layer * layers, d, d]
    stacked, wide = d * model.alignment.stack, int(h * model.alignment.ffn_multiple)
    own_attention = [h * h, h] * 4
    block = [h, h, *own_attention, h, h, h * wide, wide, wide * h, h]
    adapters = [stacked * h, h, *block, h, h, *own_attention, h, h]
    classes = 1 + (CORPUS_CLASSES if model.ctc.vocabulary == "corpus" else llm.vocabulary)
    encoder = EncoderSize(mels, d, layers * (4 * d * d + 2 * d * ffn), layers * d)
    size = SpeechSize(
        encoder=None if model.speech_encoder.precomputed else encoder,
        stacked=stacked,
        width=h,
        ffn=wide,
        classes=classes,
        all_keys=model.shrink.keys == "all",
        ctc_embedding=model.shrink.ctc_embedding,
    )
    return size, layers, tower, adapters, classes * h


def _t2c(recipe: Recipe, llm: Llm) -> tuple[T2cSize, int, list[int]]:
    t2c = recipe.model.t2c
    assert t2c is not None
    words, width = unit_words(t2c.unit_language), t2c.width
    classes = words + 2 + (llm.vocabulary if t2c.head == "full_vocab" else 0)
    layer = [width * width] * 4 + [width * t2c.ffn] * 3 + [width] * 2
    tensors = [(words + 2) * llm.width, llm.width * width, width, *layer * t2c.layers, width, width * classes]
    linear = t2c.layers * (4 * width * width + 3 * width * t2c.ffn)
    return T2cSize(llm.width, width, linear, t2c.layers * width, classes), t2c.layers, tensors


def unit_words(ref: str) -> int:
    """Words of the unit language, or the published number where it is not there."""
    from echox.units.language import UnitLanguage

    try:
        return UnitLanguage.load(resolve_data_file(ref)).size
    except DataError:
        return RANDOM_WORDS
