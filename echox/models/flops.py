"""Computes the matmul and attention FLOP of each part of a stage from sizes of networks and lengths of rows.

A multiply-add is two FLOP; norms, activations, softmax and losses are left out, as usual for a model's utilisation.
Every cost is linear in a few counts of a step: positions (sums of lengths) and pairs of query and key. A table of costs
says how many FLOP a unit of each count takes, part by part. Backward is counted where a gradient is: with respect to
activations all the way, with respect to weights for those that train. What is computed again (activation checkpointing,
flash attention's backward, the survey of a window of several micro-batches) is not counted: it is time, not work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Costs = dict[str, dict[str, float]]
"""Part to count to FLOP a unit of the count."""


class LlmSize(NamedTuple):
    """Of a causal LM with LoRA.

    Attributes:
        width: h.
        vocabulary: rows of its head.
        linear: weights in the linear maps of all layers, without LoRA.
        lora: weights of LoRA.
        attention: layers × heads × width of a head.
        reading: weights, LoRA's first matrices among them, of the first layer's maps that read its input: they need no
            gradient of it where it has none.
    """

    width: int
    vocabulary: int
    linear: int
    lora: int
    attention: int
    reading: int


class EncoderSize(NamedTuple):
    """Of a Whisper encoder: mel bands, width, weights in the linear maps of all layers, layers × width."""

    mels: int
    width: int
    linear: int
    attention: int


class SpeechSize(NamedTuple):
    """Of the speech front end.

    Attributes:
        encoder: None where its output was computed before.
        stacked: width of the stacked encoder frames that the alignment adapter projects.
        width: h of the LLM.
        ffn: of the alignment adapter's feed-forward.
        classes: of the CTC head.
        all_keys: the look-back attends all aligned frames, not only the kept ones.
        ctc_embedding: speech vectors get the embedding that the CTC head expects.
    """

    encoder: EncoderSize | None
    stacked: int
    width: int
    ffn: int
    classes: int
    all_keys: bool = True
    ctc_embedding: bool = False


class T2cSize(NamedTuple):
    """Of a T2C or Echo decoder: width of its inputs, of its body, linear weights, layers × width, classes."""

    text_width: int
    width: int
    linear: int
    attention: int
    classes: int


def encoder_costs(size: EncoderSize) -> Costs:
    """Forward of the Whisper encoder: two convolutions over three frames, the first at 100 a second, and the layers."""
    convolutions = 12.0 * size.mels * size.width + 6.0 * size.width**2
    return {"speech_encoder": {"frames": convolutions + 2.0 * size.linear, "frames_pairs": 4.0 * size.attention}}


def speech_costs(size: SpeechSize, *, adapters_train: bool, ctc_trains: bool) -> Costs:
    """Encoder, alignment and shrink adapter, CTC head; the adapters' input has no gradient."""
    width = size.width
    projection = size.stacked * width
    block = 4 * width**2 + 2 * width * size.ffn
    keys, queries = 2 * width**2, 2 * width**2
    memory = "aligned" if size.all_keys else "kept"
    forward = {"aligned": 2.0 * (projection + block), "aligned_pairs": 4.0 * width}
    backward = {"aligned_live": 2.0 * projection + 4.0 * block, "aligned_live_pairs": 8.0 * width}
    look_back = {"kept": 2.0 * queries, "kept_pairs": 4.0 * width}
    look_back_backward = {"kept_live": 4.0 * queries, "kept_live_pairs": 8.0 * width}
    if size.ctc_embedding:
        look_back["kept"] += 2.0 * width * (size.classes - 1)
        look_back_backward["kept_live"] += 2.0 * width * (size.classes - 1)
    # Keys of all frames are computed for the shrink adapter alone: not in the CTC alignment.
    look_back[f"{memory}_keys"] = 2.0 * keys
    look_back_backward[f"{memory}_keys_live"] = 4.0 * keys
    costs = {} if size.encoder is None else encoder_costs(size.encoder)
    costs |= {"adapters": {**forward, **look_back}, "ctc": {"aligned": 2.0 * width * size.classes}}
    if adapters_train:
        costs["adapters_backward"] = {**backward, **look_back_backward}
    if ctc_trains:
        costs["ctc_backward"] = {"aligned_live": (4.0 if adapters_train else 2.0) * width * size.classes}
    return costs


def llm_costs(size: LlmSize, *, inputs_live: bool) -> Costs:
    """LLM with LoRA on frozen weights, and its head; `inputs_live`: the gradient goes on to its input."""
    weights = size.linear + size.lora
    live = 2.0 * weights + 2.0 * size.lora - (0.0 if inputs_live else 2.0 * size.reading)
    head = 2.0 * size.width * size.vocabulary
    return {
        "llm": {"llm": 2.0 * weights, "llm_pairs": 4.0 * size.attention},
        "llm_backward": {"llm_live": live, "llm_live_pairs": 8.0 * size.attention},
        "head": {"head": head},
        "head_backward": {"head_live": head},
    }


def t2c_costs(size: T2cSize, name: str, *, trains: bool) -> Costs:
    """A decoder over text and units: as `name` trained on whole rows, or decoding, which makes the same matmuls."""
    body = size.text_width * size.width + size.linear
    head = size.width * size.classes
    costs = {name: {name: 2.0 * body, f"{name}_pairs": 4.0 * size.attention, f"{name}_head": 2.0 * head}}
    if trains:
        costs[f"{name}_backward"] = {
            f"{name}_live": 4.0 * body,
            f"{name}_live_pairs": 8.0 * size.attention,
            f"{name}_head_live": 4.0 * head,
        }
    return costs


def denoising_costs(width: int, ffn: int) -> Costs:
    """The Denoising Adapter; its input has no gradient while it alone is trained."""
    return {
        "denoising": {"adapted": 4.0 * width * ffn},
        "denoising_backward": {"adapted_live": 6.0 * width * ffn, "adapted_through": 2.0 * width * ffn},
    }


def flops_by_part(costs: Mapping[str, Mapping[str, float]], counts: Mapping[str, float]) -> dict[str, float]:
    """FLOP of every part that computed something."""
    found = {part: sum(each * counts.get(name, 0.0) for name, each in row.items()) for part, row in costs.items()}
    return {part: total for part, total in found.items() if total}
