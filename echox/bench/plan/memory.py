"""Predicts the memory of one GPU by part: states exactly, activations from what the layers save."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.bench.plan.timing import GPUS_PER_NODE
from echox.config.paths import resolve_file

if TYPE_CHECKING:
    from echox.bench.plan.load import Rows
    from echox.bench.plan.shapes import Llm, StageShape
    from echox.config.schema import Recipe

USABLE = 0.94
"""Share of a GPU's memory that training can fill: the rest is the CUDA context, NCCL's buffers and fragmentation."""
WORKSPACE_BYTES = 2**30
"""Of cuBLAS, attention and whatever lives for one kernel."""
CHUNK_ELEMENTS = 1 << 25
"""Logits that heads hold at once, as in `echox/models/chunked_heads.py`; one head at a time."""
LOGIT_BYTES = 16
"""A logit of a chunk: bf16 (2), fp32 (4), log-softmax (4), and the gradients of the first two (4 + 2)."""
_BF16, _FP32 = 2, 4


def state_bytes(recipe: Recipe, shape: StageShape, gpus: int, *, element: int = _BF16) -> dict[str, float]:
    """Weights, gradients and optimizer state of a rank.

    Args:
        recipe: says where frozen weights lie (not `auto`), and whether the optimizer's state is kept in host memory.
        shape: the tensors.
        gpus: ranks among which ZeRO-3 divides every tensor, each padded to a multiple of them.
        element: bytes of a weight as it computes: 2 in bf16, 4 in fp32.
    """
    own = sum(-(-size // gpus) for size in shape.trainable)
    placement = recipe.engine.frozen_placement
    whole = placement == "replicate"
    frozen = sum(size if whole else -(-size // gpus) for size in shape.frozen)
    if placement == "hpz":
        frozen += sum(-(-size // min(gpus, GPUS_PER_NODE)) for size in shape.frozen)
    zero = _zero_config(recipe)
    on_host = zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    trainable, live = sum(shape.trainable), 0
    if not whole and gpus > 1:
        # What ZeRO-3 holds at once: at most `stage3_max_live_parameters`, 1e9 by default.
        live = min(sum(shape.frozen), int(_number(zero, "stage3_max_live_parameters", 1e9)))
    reduce = int(_number(zero, "reduce_bucket_size", 5e8))
    return {
        "frozen weights": float(frozen * element),
        "trainable weights": float(own * element),
        "fp32 master weights": 0.0 if on_host else float(own * _FP32),
        "Adam's moments": 0.0 if on_host else float(2 * own * _FP32),
        "gradients": float(own * _FP32),
        "gathered weights": float((trainable + live) * element),  # what trains stays whole, see echox/engine/flat.py
        "whole gradients": float(trainable * element),  # until the last of a flat parameter is there
        "reduce bucket": float(min(reduce, trainable) * element if gpus > 1 else 0),
    }


def activation_bytes(recipe: Recipe, shape: StageShape, rows: Rows, samples: int) -> dict[str, float]:
    """What a micro-batch of `samples` keeps for its backward, and a chunk of its logits, at their largest."""
    model = recipe.model
    found: dict[str, float] = {}
    logits = 0.0
    if recipe.stage != "t2c":
        tokens = samples * rows.llm * rows.passes
        per_token = llm_bytes_per_token(
            shape.llm,
            rank=model.llm.lora.r,
            dropout=model.llm.lora.dropout > 0,
            checkpointing=recipe.engine.activation_checkpointing,
        )
        found["LLM activations"] = tokens * per_token
        # The gradient of the predicting states comes with their logits.
        found["gradient of the text loss"] = samples * rows.reply * shape.llm.width * _BF16
        assert shape.speech is not None
        trains = recipe.stage == "s2t" or model.echo.train_speech_adapters
        width, ffn = shape.llm.width, shape.speech.ffn
        kept = 2 * (shape.speech.stacked + 14 * width + 2 * ffn) if trains else 2 * (4 * width + ffn)
        found["speech activations"] = samples * rows.aligned * kept
        logits = max(rows.reply * shape.llm.vocabulary, rows.aligned * shape.speech.classes)
        if shape.speech.encoder is not None:
            found["speech encoder"] = samples * rows.frames * shape.speech.encoder.width * 2 * 10.0
    if shape.t2c is not None:
        positions, t2c = samples * rows.segments * rows.segment, model.t2c
        assert t2c is not None
        layer = 12 * t2c.width + 8 * t2c.width + 8 * t2c.ffn + 4 * t2c.width  # its norms train too
        found["decoder activations"] = positions * (t2c.layers * layer + 4 * shape.llm.width)
        logits = max(logits, rows.segments * rows.words * shape.t2c.classes)
    if recipe.stage == "echo":
        assert model.t2c is not None
        found["denoising activations"] = samples * rows.reply * (6 * shape.denoising + 16 * shape.llm.width)
        if model.echo.labels != "annotated":
            cache = 2 * _BF16 * model.t2c.layers * model.t2c.width
            # Decoded without a cap on runaway rows: each may fill its limit.
            limit = rows.segment + rows.words / max(rows.words - 1, 1) * _words_per_token(recipe) * rows.reply
            found["teacher's KV cache"] = samples * rows.segments * limit * cache * 2  # it grows by copying
    found["a chunk of logits"] = min(samples * logits, CHUNK_ELEMENTS) * LOGIT_BYTES
    return {name: float(size) for name, size in found.items()}


def _words_per_token(recipe: Recipe) -> float:
    """Words that the teacher may say for a text token."""
    if recipe.model.echo.units_per_token != "auto":
        return recipe.model.echo.units_per_token
    # It also opens data, which a machine without the libraries of a run cannot.
    from echox.builders.word_limit import likely

    return likely(recipe)


def llm_bytes_per_token(llm: Llm, *, rank: int, dropout: bool, checkpointing: bool) -> float:
    """Bytes that the layers of the LLM keep for a token in bf16, with LoRA on all maps of frozen layers."""
    if checkpointing:  # each layer's input, and one layer at a time
        return llm.layers * _BF16 * llm.width + layer_bytes_per_token(llm, rank=rank, dropout=dropout)
    return llm.layers * layer_bytes_per_token(llm, rank=rank, dropout=dropout)


def layer_bytes_per_token(llm: Llm, *, rank: int, dropout: bool) -> float:
    """Bytes that a layer keeps for a token; counted in the saved tensors of Hugging Face's Llama under PEFT.

    In units of a tensor's width: h the model's, q and k those of queries and keys, f the feed-forward's. Attention
    keeps what flash attention does. Where that is not to be had (scores in fp32, on the meta device too), squares of
    the row's length come on top.
    """
    h, f = llm.width, llm.ffn
    q, k = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    norms = 2 * (_BF16 * h + _FP32 + _BF16 * h)  # the input and its root mean square, and what LoRA reads
    attention = _BF16 * (2 * q + 2 * k) + _FP32 * llm.heads
    projected = _BF16 * q  # what the output map's LoRA reads, in its packed place
    gates = _BF16 * 4 * f  # gate, its SiLU, up, and their product
    lora = _BF16 * 7 * rank
    kept = norms + attention + projected + gates + lora
    if dropout:  # a mask of a byte for each product with A
        kept += 2 * h + q + f
    return float(kept)


def _zero_config(recipe: Recipe) -> Mapping[str, Any]:
    path = Path(resolve_file(recipe.engine.deepspeed))
    return dict(json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}))


def _number(zero: Mapping[str, Any], name: str, default: float) -> float:
    value = zero.get(name, default)
    return float(value) if isinstance(value, int | float) else default
