"""Reads the `config.json` of a release, and says which tensors of which shapes belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

STACK = 2
"""Encoder frames that the release joins into one."""
PLACEHOLDER = "<audio_patch>"
BEGIN, START_HEADER, END_HEADER, END_OF_TURN = 128_000, 128_006, 128_007, 128_009
LLAMA_3 = 128_256
"""Rows of Llama 3's own vocabulary; the placeholder comes behind them."""
OWN_KEYS = frozenset(
    {"audio_tower", "adapter_size", "unit_output", "unit_vocab_size", "unit_model", "unit_vocab", "audio_token_len"}
)
"""What a release's configuration has beside Llama's keys."""
WITH_DENOISING = ("finetune", "finetune_kd", "finetune_kd_online")
"""Values of `unit_output` with which there is a Denoising Adapter."""
SMALL, MEDIUM, LARGE = "small", "medium", "large"

Shape = tuple[int, ...]


class T2cShape(NamedTuple):
    """The Llama body of T2C."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True, kw_only=True)
class ReleaseShape:
    """Sizes of a release.

    Attributes:
        config: all of `config.json`.
        vocabulary: V, rows of text tables, the placeholder included.
        width, layers, heads, kv_heads, head_width, ffn: of the LLM.
        tied: whether its head is its input table.
        encoder_width: of the Whisper encoder.
        units: U, number of unit tokens.
        t2c: body of the Echo decoder.
    """

    config: Mapping[str, Any]
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    tied: bool
    encoder_width: int
    units: int
    t2c: T2cShape

    def llm(self) -> dict[str, Shape]:
        """Tensors of the plain Llama."""
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        found = {"model.embed_tokens.weight": (self.vocabulary, self.width), "model.norm.weight": (self.width,)}
        found |= _llama("model.", self.layers, self.width, inner, kv, self.ffn)
        return found if self.tied else {**found, "lm_head.weight": (self.vocabulary, self.width)}

    def speech(self) -> dict[str, Shape]:
        """All other tensors."""
        h, vocabulary, t2c = self.width, self.vocabulary, self.t2c
        kv = t2c.kv_heads * (t2c.width // t2c.heads)
        layer = "model.asr_transformer_encoder.layers.0."
        return {
            "model.mm_projector1.weight": (h, STACK * self.encoder_width),
            "model.mm_projector1.bias": (h,),
            **_attention(f"{layer}self_attn.", h),
            **_affine(f"{layer}norm1", h),
            **_affine(f"{layer}norm2", h),
            f"{layer}linear1.weight": (2 * h, h),
            f"{layer}linear1.bias": (2 * h,),
            f"{layer}linear2.weight": (h, 2 * h),
            f"{layer}linear2.bias": (h,),
            **_affine("model.out_norm", h),
            "model.audio_feature_head.weight": (vocabulary, h),
            **_attention("model.lbm.encoder_attn.", h),
            **_affine("model.lbm.atten_layer_norm", h),
            "unit_translator.model.embed_tokens.weight": (vocabulary, h),
            "unit_translator.unit_embedding.weight": (self.units, h),
            "unit_translator.adapter.weight": (t2c.width, h),
            "unit_translator.adapter.bias": (t2c.width,),
            **_llama("unit_translator.model.", t2c.layers, t2c.width, t2c.width, kv, t2c.ffn),
            "unit_translator.model.norm.weight": (t2c.width,),
            "unit_translator.lm_head.weight": (vocabulary + self.units, t2c.width),
            "unit_translator.aligner_MLP.0.weight": (self.ffn, h),
            "unit_translator.aligner_MLP.0.bias": (self.ffn,),
            "unit_translator.aligner_MLP.3.weight": (h, self.ffn),
            "unit_translator.aligner_MLP.3.bias": (h,),
        }


def parse(config: Any) -> tuple[ReleaseShape | None, list[str]]:
    """Sizes of a release, and all that is wrong with its configuration; no sizes where they cannot be told."""
    if not isinstance(config, dict):
        return None, ["config.json is no JSON object"]
    problems: list[str] = []
    if config.get("model_type") != "EchoX":
        problems.append(f"config.json: model_type is {config.get('model_type')!r:.60}, not 'EchoX'")
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "adapter_size", "unit_vocab_size"]
    numbers = {name: config.get(name) for name in names}
    most = {"num_hidden_layers": 1 << 10}  # each has names of its own
    wrong = [
        name for name, value in numbers.items() if type(value) is not int or not 0 < value < most.get(name, 1 << 24)
    ]
    problems += [f"config.json: {name} is {config.get(name)!r:.60}, not a size" for name in wrong]
    output = config.get("unit_output")
    if output not in WITH_DENOISING:
        problems.append(
            f"config.json: unit_output is {output!r:.60}; only {', '.join(WITH_DENOISING)} have the Denoising Adapter, "
            "without which hidden states cannot be spoken"
        )
    if wrong:
        return None, problems
    vocabulary, h, ffn, layers, heads, kv_heads, encoder_width, units = (int(numbers[name] or 0) for name in names)
    head_width = config.get("head_dim") or h // heads
    if type(head_width) is not int or h % heads or heads % kv_heads:
        return None, [*problems, f"config.json: {heads} heads, {kv_heads} of keys, do not divide hidden_size={h}"]
    if vocabulary <= END_OF_TURN:
        problems.append(f"config.json: vocab_size={vocabulary} has no Llama 3 control tokens")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act is {config['hidden_act']!r:.60}, not 'silu'")
    problems += [
        f"config.json: {name} is on, which our modules have not"
        for name in ("attention_bias", "mlp_bias")
        if config.get(name)
    ]
    t2c = t2c_shape(config.get("unit_model"), h, heads, kv_heads, ffn)
    if t2c.kv_heads != t2c.heads:
        problems.append(
            f"config.json: T2C has {t2c.heads} heads and, as the LLM, {t2c.kv_heads} of keys: grouped attention, which "
            "our T2C decoder has not"
        )
    if t2c.kv_heads > t2c.heads or t2c.width % t2c.heads:
        return None, problems
    shape = ReleaseShape(
        config=config, vocabulary=vocabulary, width=h, layers=layers, heads=heads, kv_heads=kv_heads,
        head_width=head_width, ffn=ffn, tied=bool(config.get("tie_word_embeddings", False)),
        encoder_width=encoder_width, units=units, t2c=t2c,
    )  # fmt: skip
    return shape, problems


def t2c_shape(unit_model: Any, width: int, heads: int, kv_heads: int, ffn: int) -> T2cShape:
    """What the released code makes of `unit_model` beside an LLM of these sizes."""
    if unit_model is None:
        return T2cShape(6, 512, 8, kv_heads, 2048)
    if unit_model == SMALL:
        return T2cShape(4, 512, 8, kv_heads, 2048)
    if unit_model == LARGE:
        return T2cShape(2, width, heads, kv_heads, ffn)
    return T2cShape(8, 768, 12, 12, 2048)


def _llama(prefix: str, layers: int, width: int, inner: int, kv: int, ffn: int) -> dict[str, Shape]:
    layer: dict[str, Shape] = {
        "self_attn.q_proj": (inner, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, inner),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {f"{prefix}layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}


def _attention(prefix: str, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}in_proj_weight": (3 * width, width),
        f"{prefix}in_proj_bias": (3 * width,),
        f"{prefix}out_proj.weight": (width, width),
        f"{prefix}out_proj.bias": (width,),
    }


def _affine(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
