"""Predicts the time of a step by a roofline: of each part the slowest of arithmetic, memory and the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from echox.bench.plan.load import counts, stage_costs
from echox.models.flops import flops_by_part

if TYPE_CHECKING:
    from echox.bench.plan.load import Rows
    from echox.bench.plan.shapes import StageShape
    from echox.config.schema import Recipe
    from echox.engine.hardware import Gpu

EFFICIENCY = 0.44
"""Share of the data sheet's FLOP/s that large matrix products and what stands between them reach: 55 % of the 80 % that
products alone do."""
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.7
LAUNCH_S = 15e-6
"""Host time of a kernel under eager PyTorch, transformers and PEFT."""
REPLAY_S = 3e-6
"""Time of a small kernel in a replayed CUDA graph, whose launch the host no longer does."""
SLICE_S = 10e-6
"""Host time of ZeRO-3 a step for one flat parameter and rank (8 to 12 µs, with a stand-in for the network)."""
GPUS_PER_NODE = 8
_LLM_KERNELS, _TOWER_KERNELS, _DECODER_KERNELS = 143, 20, 70
"""Kernels of a layer: LLM with LoRA, forward and backward (181 counted on a CPU, where norms are taken apart and rows
padded for attention); speech encoder; trained decoder, forward and backward."""
_DECODE_LAYER, _DECODE_REST = 14, 13
"""Kernels of a decode step of the teacher, counted: 97 with 6 layers and 125 with 8."""
_REST_KERNELS = 1500
_STATE_BYTES = 30
"""That AdamW reads and writes for a trainable weight."""


@dataclass(frozen=True)
class PartTime:
    """A part of the step: its FLOP and its seconds by each limit, of which the largest holds."""

    flops: float
    compute_s: float
    memory_s: float
    host_s: float
    link_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the limit that holds."""
        return max(self.compute_s, self.memory_s, self.host_s, self.link_s)

    @property
    def bound(self) -> str:
        """Name of that limit."""
        limits = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "host": self.host_s,
            "communication": self.link_s,
        }
        return max(limits, key=lambda name: limits[name])


_WITH = {
    "speech_encoder": "speech encoder",
    "adapters": "speech adapters",
    "ctc": "CTC head",
    "llm": "LLM",
    "head": "text head",
    "denoising": "denoising",
    "echo": "Echo decoder",
    "t2c": "T2C decoder",
    "teacher": "teacher",
}


def step_flops(recipe: Recipe, shape: StageShape, rows: Rows, samples: int) -> dict[str, float]:
    """Useful FLOP of a micro-batch by part, forward and backward apart."""
    return flops_by_part(stage_costs(recipe, shape), counts(recipe, rows, samples))


def times(
    recipe: Recipe,
    shape: StageShape,
    rows: Rows,
    samples: int,
    *,
    gpu: Gpu,
    gpus: int,
    network_gb_s: float,
    micro_batches: int,
) -> dict[str, PartTime]:
    """Parts of an optimizer step, one after the other: `micro_batches` of `samples` each, then the update.

    Stage III surveys a step of several micro-batches in a forward of each, without gradient, beforehand.
    """
    flops = step_flops(recipe, shape, rows, samples)
    survey = surveys(recipe, micro_batches)
    again = 1 if recipe.engine.activation_checkpointing else 0
    kernels = _kernels(recipe, shape, rows)
    weights = _weights(shape)
    speed, bandwidth = gpu.tflops * 1e12 * EFFICIENCY, gpu.memory_tb_s * 1e12 * MEMORY_EFFICIENCY
    found: dict[str, PartTime] = {}
    for part, name in _WITH.items():
        forward, backward = flops.get(part, 0.0), flops.get(f"{part}_backward", 0.0)
        if not forward + backward:
            continue
        forwards = 1 if part == "teacher" else 1 + survey + (again if part == "llm" else 0)
        reads = rows.words * 1.1 if part == "teacher" else forwards + (1 if backward else 0)
        found[name] = PartTime(
            flops=micro_batches * (forward + backward),
            compute_s=micro_batches * (forwards * forward + backward) / speed,
            memory_s=micro_batches * reads * 2 * weights.get(part, 0) / bandwidth,
            host_s=micro_batches
            * kernels.get(part, 0.0)
            * (REPLAY_S if part == "teacher" else LAUNCH_S * (1 + survey / 3)),
        )
    trainable = sum(shape.trainable)
    found["everything else"] = PartTime(0.0, 0.0, 0.0, micro_batches * LAUNCH_S * _REST_KERNELS)
    found["optimizer and ZeRO-3"] = PartTime(
        0.0,
        0.0,
        trainable / gpus * _STATE_BYTES / bandwidth,
        SLICE_S * shape.flats * (gpus if gpus > 1 else 0),
    )
    link = link_bytes(recipe, shape, gpus, micro_batches)
    if gpus > 1:
        rate = (gpu.link_gb_s if gpus <= GPUS_PER_NODE else min(network_gb_s, gpu.link_gb_s)) * 1e9 * LINK_EFFICIENCY
        found["communication"] = PartTime(0.0, 0.0, 0.0, 0.0, sum(link.values()) / rate)
    return found


def link_bytes(recipe: Recipe, shape: StageShape, gpus: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a rank receives a step: what trains, once; divided frozen weights, in each pass; and gradients.

    Args:
        recipe: says whether frozen weights are gathered too, and by its stage whether a step is surveyed.
        shape: the tensors.
        gpus: ranks.
        micro_batches: of a rank and step.
    """
    trainable, frozen = 2.0 * sum(shape.trainable), 2.0 * sum(shape.frozen)
    # Between so many ranks frozen weights are gathered.
    among = {"shard": gpus, "hpz": min(gpus, GPUS_PER_NODE)}.get(recipe.engine.frozen_placement, 1)
    passes = micro_batches * (2 + surveys(recipe, micro_batches))
    share = (gpus - 1) / gpus
    return {
        "weights": share * trainable + passes * (among - 1) / among * frozen,
        "gradients": micro_batches * share * trainable,
    }


def surveys(recipe: Recipe, micro_batches: int) -> int:
    """Forwards without gradient that each micro-batch gets beforehand."""
    return 1 if recipe.stage == "echo" and micro_batches > 1 else 0


def _kernels(recipe: Recipe, shape: StageShape, rows: Rows) -> dict[str, float]:
    """Kernels of a micro-batch by part, forward and backward together."""
    decode = _DECODE_LAYER * shape.t2c_layers + _DECODE_REST
    return {
        "speech_encoder": float(_TOWER_KERNELS * shape.encoder_layers),
        "llm": float(_LLM_KERNELS * shape.llm.layers * rows.passes),
        "echo": float(_DECODER_KERNELS * shape.t2c_layers),
        "t2c": float(_DECODER_KERNELS * shape.t2c_layers),
        # The longest of the rows sets the number of steps.
        "teacher": decode * rows.words * 1.5,
    }


def _weights(shape: StageShape) -> dict[str, float]:
    """Weights that a part reads once a pass."""
    found: dict[str, float] = {"llm": shape.llm_size.linear + shape.llm_size.lora}
    found["head"] = shape.llm.vocabulary * shape.llm.width
    if shape.speech is not None:
        found["ctc"] = shape.speech.classes * shape.llm.width
        found["adapters"] = shape.speech.stacked * shape.llm.width + 8 * shape.llm.width**2
        found["speech_encoder"] = shape.speech.encoder.linear if shape.speech.encoder is not None else 0
    if shape.t2c is not None:
        size = shape.t2c.linear + shape.t2c.width * (shape.t2c.text_width + shape.t2c.classes)
        found |= dict.fromkeys(("echo", "t2c", "teacher"), float(size))
    return found
