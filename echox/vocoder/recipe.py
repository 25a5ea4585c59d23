"""Defines and loads the recipe of a vocoder: what a unit HiFi-GAN is trained on, its sizes, losses and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from echox.config.load import find_recipe, load_checked
from echox.config.locations import unfit_places
from echox.config.paths import is_url
from echox.config.schema import Breach, QuarantineConfig, ScalingConfig, TrackingConfig, worker_rules
from echox.config.section import Free, Guarded, Section
from echox.vocoder.shape import HifiGanShape

FOLDER = "vocoders"
"""Below `launch/`: the recipes that come with the project."""
STAGE = "vocoder"
"""What `stage` says in such a recipe, where those of EchoX's stages name theirs."""
FRAMES_PER_S = 50


class VoiceData(Section):
    """What is read, and in what portions."""

    train: Guarded[tuple[str, ...]] = Field(
        min_length=1,
        description="folders of shards with answer.flac, answer.units and answer.durations, of one voice unless "
        "generator.speaker says otherwise; or names below $ECHOX_CACHE/data",
    )
    valid: Free[str | None] = Field(None, description="one to validate on, and to speak samples of; null: neither")
    global_batch: Guarded[PositiveInt] = Field(16, description="clips in one optimizer step, over all ranks")
    micro_batch: Free[PositiveInt] = Field(16, description="clips in one forward on one rank, as memory allows")
    segment_frames: PositiveInt = Field(
        28,
        description="frames of 20 ms that are heard of each clip, from a random place; 28 are 8,960 samples at 16 kHz",
    )
    window_shards: Guarded[PositiveInt] = Field(16, description="shards whose samples are shuffled together")
    quarantine: Free[QuarantineConfig] = QuarantineConfig()
    reader_threads: Free[PositiveInt] = Field(2, description="decoding threads a rank")
    prefetch: Free[PositiveInt] = Field(2, description="micro-batches decoded ahead")


class GeneratorConfig(Section):
    """The generator; the defaults are the sizes of the mHuBERT layer 11, km1000, vocoder."""

    units: PositiveInt | None = Field(None, description="number of units; null: as the record of the shards says")
    embedding: PositiveInt = Field(128, description="width of a unit's vector")
    speaker: Guarded[int] = Field(
        0,
        ge=0,
        description="width of a speaker's vector, of which each speaker that the shards of data.train name has one; "
        "0: one voice",
    )
    sample_rate: PositiveInt = Field(
        16_000, description="samples a second of what it speaks; answer.flac has as many, or more"
    )
    rates: tuple[PositiveInt, ...] = Field(
        (5, 4, 4, 2, 2),
        description="of the transposed convolutions; their product is the samples of a frame, sample_rate / 50",
    )
    kernels: tuple[PositiveInt, ...] = Field((11, 8, 8, 4, 4), description="of each of them")
    channels: PositiveInt = Field(512, description="before the first of them; each halves it")
    resblock_kernels: tuple[PositiveInt, ...] = Field((3, 7, 11), description="of the residual blocks behind each")
    resblock_dilations: tuple[tuple[PositiveInt, ...], ...] = Field(
        ((1, 3, 5), (1, 3, 5), (1, 3, 5)), description="of the convolutions of each residual block"
    )
    duration_dropout: float = Field(0.5, ge=0, lt=1, description="in the duration predictor")

    def shape(self, units: int, speakers: int = 1) -> HifiGanShape:
        """The sizes, for a number of units and of speakers."""
        return HifiGanShape(
            units=units,
            embedding=self.embedding,
            speaker=self.speaker,
            speakers=speakers,
            rates=self.rates,
            kernels=self.kernels,
            channels=self.channels,
            resblock_kernels=self.resblock_kernels,
            resblock_dilations=self.resblock_dilations,
            dropout=self.duration_dropout,
            sample_rate=self.sample_rate,
        )


class DiscriminatorConfig(Section):
    """The discriminators of periods and of scales."""

    channels: PositiveInt = Field(1024, description="of their widest layers; the others keep their share of it")


class LossConfig(Section):
    """Weights of the generator's losses beside that of the discriminators' verdict, which is 1."""

    mel: PositiveFloat = Field(45.0, description="L1 of the log-mel")
    features: PositiveFloat = Field(2.0, description="L1 of what the layers of the discriminators see")
    duration: PositiveFloat = Field(1.0, description="squared error of log(1 + frames)")


class VoiceOptim(Section):
    """AdamW of the generator and of the discriminators; the defaults are those of HiFi-GAN."""

    steps: Free[PositiveInt] = Field(
        description="optimizer steps of the whole run; one that has ended goes on with more"
    )
    lr: PositiveFloat = Field(2e-4, description="learning rate of the first epoch")
    decay: float = Field(0.999, gt=0, le=1, description="factor of the learning rate after each epoch")
    betas: tuple[float, float] = Field((0.8, 0.99), description="of AdamW, each below 1")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")


class VoiceRecipe(Section):
    """One run of `echox vocoder train`."""

    name: Free[str] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="run folder below storage, and MLflow name: letters, digits, dots, dashes and underscores",
    )
    stage: Literal["vocoder"] = Field(description="vocoder, which tells it from the recipes of the stages")
    scale: Free[str] = Field("vocoder", description="a tag to compare runs by")
    seed: Guarded[int] = Field(17, description="of new weights, dropout, order of the data and places in clips")
    storage: Free[str] = Field("runs", description="folder of runs, which every rank sees")
    data: VoiceData
    generator: GeneratorConfig = GeneratorConfig()
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    loss: LossConfig = LossConfig()
    optim: VoiceOptim
    log_every: Free[PositiveInt] = Field(50, description="steps between lines of metrics")
    checkpoint_every: Free[int] = Field(1000, ge=0, description="steps; 0 saves at the end only")
    keep: Free[PositiveInt] = Field(2, description="newest checkpoints that stay")
    sample_every: Free[int] = Field(
        1000, ge=0, description="steps between validations, each with waveforms of data.valid; 0: at the end only"
    )
    samples: Free[PositiveInt] = Field(4, description="clips of data.valid that are spoken each time")
    scaling: Free[ScalingConfig] = ScalingConfig()
    tracking: Free[TrackingConfig] = TrackingConfig()


def load_voice(path: str | Path, overrides: Sequence[str] = ()) -> VoiceRecipe:
    """Read, override and check one recipe of a vocoder.

    Args:
        path: YAML file, or the short name of one below `launch/vocoders`, such as `demo`.
        overrides: `key.sub=value` each.

    Raises:
        RecipeError: one sentence per mistake, all of them.
    """
    return load_checked(VoiceRecipe, find_recipe(path, FOLDER), overrides, rules)


def worker_counts(recipe: VoiceRecipe) -> tuple[int, ...]:
    """The numbers of workers within `scaling.workers` that the batch divides by, ascending."""
    (least, most), data = recipe.scaling.bounds, recipe.data
    return tuple(count for count in range(least, most + 1) if data.global_batch % (data.micro_batch * count) == 0)


def rules(recipe: VoiceRecipe) -> list[Breach]:
    """Every rule that spans keys and that this recipe breaks."""
    found = [Breach(("generator",), f"generator: {what}", "see the defaults") for what in _misfits(recipe.generator)]
    found += [*_batch_rules(recipe), *worker_rules(recipe.scaling)]
    if not all(0 <= beta < 1 for beta in recipe.optim.betas):
        found.append(Breach(("optim.betas",), "optim.betas are not both from 0 to below 1", "write [0.8, 0.99]"))
    data = {f"data.train.{index}": place for index, place in enumerate(recipe.data.train)}
    data |= {} if recipe.data.valid is None else {"data.valid": recipe.data.valid}
    unfit = unfit_places(recipe.storage, recipe.tracking.uri, data)
    found += [Breach((each.key,), each.rule, each.fix) for each in unfit]
    if is_url(recipe.storage) and not any("storage" in each.keys for each in found):
        found.append(Breach(("storage",), f"storage={recipe.storage} is no folder", "name one that every rank sees"))
    return found


def _batch_rules(recipe: VoiceRecipe) -> list[Breach]:
    (least, most), counts, data = recipe.scaling.bounds, worker_counts(recipe), recipe.data
    if least in counts and most in counts:
        return []
    keys = ("data.global_batch", "data.micro_batch", "scaling.workers")
    workers = least if least == most else most if least in counts else least
    rule = (
        f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch * scaling.workers = "
        f"{data.micro_batch} * {workers} = {data.micro_batch * workers}"
    )
    return [Breach(keys, rule, "give a multiple, or a smaller data.micro_batch")]


def _misfits(config: GeneratorConfig) -> list[str]:
    shape = config.shape(config.units or 1)
    found = list(shape.mistakes()) or list(shape.misfits())
    if not found and shape.hop * FRAMES_PER_S != shape.sample_rate:
        found.append(
            f"the product of rates is {shape.hop}, and a unit frame of 20 ms at {shape.sample_rate:,} Hz has "
            f"{shape.sample_rate / FRAMES_PER_S:g} samples"
        )
    return found
