"""Predicts a recipe's memory, step time and traffic on a number of GPUs, and says what fits and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echox.bench.plan.load import Rows, Sample, rows_of
from echox.bench.plan.memory import USABLE, WORKSPACE_BYTES, activation_bytes, state_bytes
from echox.bench.plan.shapes import StageShape, stage_shape
from echox.bench.plan.timing import GPUS_PER_NODE, PartTime, link_bytes, times
from echox.engine.placement import choose_placement

if TYPE_CHECKING:
    from echox.config.schema import Recipe
    from echox.engine.hardware import Gpu

MOST_SAMPLES = 4096
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is predicted; nothing of it is measured on a GPU.

    Attributes:
        recipe, gpus, hardware: what was asked.
        micro_batch, micro_batches: samples at once, and how many times a step on each rank.
        global_batch: samples of a step; more than the recipe's where that has fewer than there are GPUs.
        memory: bytes of a GPU by part.
        limit: bytes that training can fill.
        largest: samples of the largest micro-batch that fits; 0 where none does.
        parts: times of a step.
        link: bytes that a rank receives a step.
        frozen, trainable: parameters.
        steps: optimizer steps of the run.
        sample_s: seconds of a sample's audio, as assumed.
        advice: what to change, a sentence each; empty where the recipe fits as it is.
    """

    recipe: str
    gpus: int
    hardware: str
    micro_batch: int
    micro_batches: int
    global_batch: int
    memory: dict[str, float]
    limit: float
    largest: int
    parts: dict[str, PartTime]
    link: dict[str, float]
    frozen: int
    trainable: int
    steps: int
    sample_s: float
    peak_flops: float
    advice: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step: its parts one after the other."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def flops(self) -> float:
        """Useful FLOP of a rank and step."""
        return sum(part.flops for part in self.parts.values())

    @property
    def mfu(self) -> float:
        """Useful FLOP/s over the data sheet's."""
        return self.flops / self.step_s / self.peak_flops

    @property
    def bound(self) -> str:
        """The limit that takes most of the step."""
        shares: dict[str, float] = {}
        for part in self.parts.values():
            shares[part.bound] = shares.get(part.bound, 0.0) + part.seconds
        return max(shares, key=lambda name: shares[name])

    def corpus_hours(self, audio_hours: float) -> float:
        """Hours of one pass over so many hours of audio."""
        return audio_hours * 3600 / self.sample_s / self.global_batch * self.step_s / 3600

    def as_json(self) -> dict[str, Any]:
        """All of it, and what follows from it."""
        parts = {
            name: {**vars(part), "seconds": part.seconds, "bound": part.bound} for name, part in self.parts.items()
        }
        derived = {"step_s": self.step_s, "flops": self.flops, "mfu": self.mfu, "bound": self.bound}
        return {"measured": False, **vars(self), "parts": parts, **derived}


def forecast(
    recipe: Recipe, gpu: Gpu, hardware: str, gpus: int, *, sample: Sample | None = None, network_gb_s: float = 50.0
) -> Forecast:
    """Predict a recipe on `gpus` GPUs.

    Args:
        recipe: its weights and data are not read.
        gpu, hardware: limits of a GPU and their name.
        gpus: ranks, one a GPU, eight a node.
        sample: lengths, the same of every sample.
        network_gb_s: GB/s between nodes, for each GPU and direction.
    """
    from echox.config.schema import batch_sentence  # where memory alone is asked for, pydantic is not needed

    sample = sample or Sample()
    shape, rows = stage_shape(recipe), rows_of(recipe, sample)
    grown = batch_sentence(recipe, gpus)
    placement = choose_placement(
        recipe.engine.frozen_placement,
        frozen_bytes=2 * sum(shape.frozen),
        memory_bytes=int(gpu.memory_gib * GIB),
        nodes=-(-gpus // GPUS_PER_NODE),
    )
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.on(gpus),
            "engine": recipe.engine.model_copy(update={"frozen_placement": placement}),
        }
    )
    wanted, micro = _batches(recipe, sample)
    micro_batches = max(1, round(wanted / (micro * gpus)))
    if micro * gpus > wanted:
        micro = max(1, wanted // gpus)
    limit = gpu.memory_gib * GIB * USABLE
    memory = memory_bytes(recipe, shape, rows, micro, gpus)
    largest = largest_micro_batch(recipe, shape, rows, gpus, limit)
    return Forecast(
        recipe=recipe.name,
        gpus=gpus,
        hardware=hardware,
        micro_batch=micro,
        micro_batches=micro_batches,
        global_batch=micro * gpus * micro_batches,
        memory=memory,
        limit=limit,
        largest=largest,
        parts=times(
            recipe, shape, rows, micro, gpu=gpu, gpus=gpus, network_gb_s=network_gb_s, micro_batches=micro_batches
        ),
        link=link_bytes(recipe, shape, gpus, micro_batches),
        frozen=sum(shape.frozen),
        trainable=sum(shape.trainable),
        steps=recipe.optim.steps,
        sample_s=sample.question_s,
        peak_flops=gpu.tflops * 1e12,
        advice=(
            *([f"{grown[0].upper()}{grown[1:]}."] if grown else []),
            *_advice(recipe, shape, rows, gpus, limit, micro, largest, wanted, micro * gpus * micro_batches),
        ),
    )


def memory_bytes(recipe: Recipe, shape: StageShape, rows: Rows, samples: int, gpus: int) -> dict[str, float]:
    """Bytes of a GPU by part."""
    return {
        **state_bytes(recipe, shape, gpus),
        **activation_bytes(recipe, shape, rows, samples),
        "workspace": float(WORKSPACE_BYTES),
    }


def largest_micro_batch(recipe: Recipe, shape: StageShape, rows: Rows, gpus: int, limit: float) -> int:
    """Most samples whose step fits into `limit` bytes; memory grows with them, so bisection finds it."""
    fits, too_many = 0, MOST_SAMPLES + 1
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        if sum(memory_bytes(recipe, shape, rows, tried, gpus).values()) <= limit:
            fits = tried
        else:
            too_many = tried
    return fits


def _batches(recipe: Recipe, sample: Sample) -> tuple[int, int]:
    """Samples of a step and of a micro-batch, as the recipe asks for them."""
    budget = recipe.data.budget
    if budget is None:
        return recipe.data.global_batch, recipe.data.micro_batch
    length = sample.question_s if budget.by == "seconds" else sample.reply
    micro = max(1, int(budget.size / length))
    return micro * budget.micro_batches, micro


def _advice(
    recipe: Recipe,
    shape: StageShape,
    rows: Rows,
    gpus: int,
    limit: float,
    micro: int,
    largest: int,
    wanted: int,
    used: int,
) -> list[str]:
    found = []
    if used != wanted:
        found.append(
            f"{wanted} samples a step do not divide into equal micro-batches on {gpus} GPUs: set "
            f"data.global_batch={used} data.micro_batch={micro}, or data.batch_for to the GPUs that {wanted} are for."
        )
    if micro <= largest:
        return found
    if largest:
        return [*found, f"{micro} samples at once do not fit: set data.micro_batch={_divisor(micro, largest)}."]
    tried: tuple[tuple[str, dict[str, Any]], ...] = (
        ("engine.frozen_placement=shard", {"frozen_placement": "shard"}),
        ("engine.activation_checkpointing=true", {"activation_checkpointing": True}),
        (
            "engine.frozen_placement=shard engine.activation_checkpointing=true",
            {"frozen_placement": "shard", "activation_checkpointing": True},
        ),
    )
    for changes, update in tried:
        changed = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)})
        fits = largest_micro_batch(changed, shape, rows, gpus, limit)
        if fits:
            batch = _divisor(micro, fits)
            return [*found, f"Not one sample fits: set {changes} data.micro_batch={batch}."]
    return [
        *found,
        "Not one sample fits, also with sharded frozen weights and checkpointed activations: take more or larger GPUs.",
    ]


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(each for each in range(1, min(number, most) + 1) if number % each == 0)
