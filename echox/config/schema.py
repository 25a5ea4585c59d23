"""The typed tree of one recipe: every knob of a run, its unit, its default and the reason for it.

Only shapes and rules live here; reading YAML, overrides and error sentences are in `echox.config.load`.
"U1" to "U27" number the paper's unknowns; the comments name the default and the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

StageName = Literal["s2t", "t2c", "echo"]
Precision = Literal["auto", "bf16", "fp32"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class LoraConfig(Section):
    """Low-rank adaptation of the LLM's linear maps (U6)."""

    r: PositiveInt = Field(64, description="rank")
    alpha: PositiveFloat = Field(16.0, description="scale numerator: the update is alpha/r * BA")
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the linear maps that get an adapter",
    )


class PromptConfig(Section):
    """The chat template around one spoken turn, in the LLM's own special tokens (U17: one BOS, no quirks)."""

    before: str = Field(description="text before the audio")
    after: str = Field(description="text between the audio and the response")
    end: str = Field(description="token that ends the response")


class LlmConfig(Section):
    """Any Hugging Face causal LM (U24)."""

    path: str = Field(description="model folder, or a name below $ECHOX_CACHE/models")
    lora: LoraConfig = LoraConfig()
    prompt: PromptConfig


class SpeechEncoderConfig(Section):
    """The frozen Whisper encoder."""

    path: str = Field(description="Whisper folder, or a name below $ECHOX_CACHE/models")
    input: Literal["trim", "pad_30s"] = Field(
        "trim", description="trim: real frames plus a margin; pad_30s: as Whisper was pretrained, 3 to 7 times the cost"
    )
    margin_s: float = Field(0.5, ge=0, le=5, description="silence appended when trimming, seconds")
    max_audio_s: float = Field(30.0, gt=0, le=30, description="longer audio is cut here and counted (U27), seconds")
    precomputed: bool = Field(
        False, description="read the encoder's output from the shards (`echox shards encode`), no forward in training"
    )


class AlignmentAdapterConfig(Section):
    """Frame stacking, projection to the LLM width, one Transformer encoder layer, LayerNorm (Soundwave)."""

    stack: PositiveInt = Field(2, description="encoder frames joined into one; 2 gives 25 Hz")
    heads: PositiveInt | None = Field(None, description="attention heads; None takes the LLM's")
    ffn_multiple: PositiveFloat = Field(2.0, description="feed-forward width over LLM width")
    dropout: float = Field(0.1, ge=0, lt=1)
    attention: Literal["time", "frame_local"] = Field(
        "time", description="U18: attention over time, or the released code's effective per-frame form"
    )


class CtcConfig(Section):
    """The auxiliary CTC head over LLM tokens; blank is the audio placeholder token (released code)."""

    weight: float = Field(0.3, ge=0, description="weight beside the text loss")
    vocabulary: Literal["llm", "corpus"] = Field(
        "llm", description="classes: every LLM token, or only those in the training transcripts (cheap on a CPU)"
    )
    init_from_llm: bool = Field(True, description="U26: start the head from the LLM's token table")
    align_steps: int = Field(0, ge=0, description="U26: first steps that train only the adapter and this head by CTC")


class ShrinkConfig(Section):
    """Keep one frame a run of equal CTC labels, then look back at the frames by cross-attention (Soundwave)."""

    heads: PositiveInt | None = Field(None, description="attention heads; None takes the LLM's")
    dropout: float = Field(0.1, ge=0, lt=1)
    keys: Literal["all", "kept"] = Field("all", description="frames the look-back attends: all, or the release's kept")
    blanks: Literal["keep", "drop"] = Field(
        "keep", description="whether a run of CTC blanks keeps a frame, as released"
    )
    ctc_embedding: bool = Field(
        False,
        description="add the text embedding the CTC head expects: speech reads as text before the LLM was ever tuned",
    )


class T2cConfig(Section):
    """The text-to-codec decoder: frozen text table, trained unit table, small Llama stack, unit head."""

    layers: PositiveInt = 6
    width: PositiveInt = 512
    heads: PositiveInt = 8
    ffn: PositiveInt = 2048
    max_positions: PositiveInt = 2048
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input embeddings while training")
    text_stride: PositiveFloat | None = Field(
        None, description="words spoken a text token, to set both at like rotary positions; None counts on"
    )
    head: Literal["units", "full_vocab"] = Field("units", description="U15: unit classes only, or text and units")
    prefix: str = Field(min_length=1, description="text before the words, in the LLM's own special tokens")
    unit_header: str = Field(min_length=1, description="text between the words and the units")
    unit_language: str = Field(
        description="unit-language JSON fitted on the corpus, file path or name below $ECHOX_CACHE/data"
    )


class DenoisingConfig(Section):
    """Maps the LLM's hidden states to text embeddings: Linear, ReLU, dropout, Linear (Eq. 2)."""

    ffn: PositiveInt | None = Field(None, description="hidden width; None takes the LLM's feed-forward width")
    dropout: float = Field(0.1, ge=0, lt=1)
    weighting: Literal["dynamic_cap", "fixed"] = Field("dynamic_cap", description="U1: how lambda of Eq. 4 is set")
    cap: PositiveFloat = Field(0.2, description="dynamic_cap: its share of the echo loss may not exceed this")
    weight: float = Field(0.1, ge=0, description="fixed: lambda itself")
    align_steps: int = Field(
        0,
        ge=0,
        description="first steps that train only this adapter, forward through the LLM and without the teacher: the "
        "Echo decoder then starts on inputs it knows (0 in the paper)",
    )


class SegmentationConfig(Section):
    """Where the response is cut into segments for the streaming trigger (U3)."""

    mode: Literal["trigger", "none", "fixed"] = "trigger"
    min_tokens: PositiveInt = 20
    max_wait: PositiveInt = 50
    threshold: float = 0.1
    look_ahead: PositiveInt = 5
    fixed_tokens: PositiveInt = Field(20, description="mode=fixed: tokens in a segment")


class EchoConfig(Section):
    """Stage III: pseudo text, segments, teacher decoding."""

    pseudo_text: Literal["argmax_teacher_forced", "reference", "free_run"] = Field(
        "argmax_teacher_forced", description="U2: where X' comes from"
    )
    segmentation: SegmentationConfig = SegmentationConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    s2t_weight: float = Field(1.0, ge=0, description="U4: weight of the text loss in Eq. 4")
    units_per_token: PositiveInt = Field(12, description="U20: the teacher stops after units_per_token * T + 32 words")
    free_run_tokens: PositiveInt = Field(64, description="pseudo_text=free_run: tokens generated for every sample")
    train_speech_adapters: bool = Field(False, description="the release's parameter count says they are frozen")


class ModelConfig(Section):
    """The parts of the speech-to-speech model; a stage builds those it needs."""

    llm: LlmConfig
    speech_encoder: SpeechEncoderConfig | None = None
    alignment: AlignmentAdapterConfig = AlignmentAdapterConfig()
    ctc: CtcConfig = CtcConfig()
    shrink: ShrinkConfig = ShrinkConfig()
    t2c: T2cConfig | None = None
    echo: EchoConfig = EchoConfig()
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="rows of a training forward: end to end, or each padded to the longest under a mask; same losses",
    )
    random_init: bool = Field(False, description="true shapes, random weights: needs config.json and tokenizer only")


class SourceConfig(Section):
    """One folder of shards."""

    path: str = Field(description="folder of shards, or a name below $ECHOX_CACHE/data")
    task: Literal["sqa", "asr", "tts"]
    repeat: PositiveInt = Field(1, description="passes over this source in one epoch, where sources are one union")
    weight: PositiveFloat | None = Field(
        None, description="share of the stream; given to all sources, they are blended without end, each wrapping alone"
    )


class BudgetConfig(Section):
    """What a micro-batch may cost, in place of a fixed number of samples (U9).

    The cost is the sum of the samples' lengths, or rows times the longest where `model.layout` is padded. A sample's
    tokens are estimated: 25 speech vectors a second and a quarter of its characters, or its units and those.
    """

    by: Literal["seconds", "tokens"]
    size: PositiveFloat = Field(description="most that one forward on one rank may cost; a longer sample goes alone")
    micro_batches: PositiveInt = Field(
        description="micro-batches in one optimizer step, over all ranks; any number of ranks that divides it will do"
    )


class QuarantineConfig(Section):
    """How many damaged samples a run may drop before it stops."""

    samples: int | None = Field(None, ge=0, description="in all; None is any number")
    share: float = Field(0.01, ge=0, le=1, description="of the samples seen, of 1,000 at least")


class DataConfig(Section):
    """What is read, and in what portions."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    valid: tuple[SourceConfig, ...] = ()
    global_batch: PositiveInt = Field(128, description="samples in one optimizer step, over all ranks (U7)")
    micro_batch: PositiveInt = Field(16, description="samples in one forward on one rank")
    budget: BudgetConfig | None = Field(None, description="takes the place of global_batch and micro_batch")
    window_shards: PositiveInt = Field(16, description="shards whose samples are shuffled together and read ahead")
    pool: PositiveInt | None = Field(
        None,
        description="optimizer steps whose samples are sorted by length together: more leave less padding, and lengths "
        "that differ less within a step; None is the whole window",
    )
    weight_by: Literal["samples", "seconds", "tokens"] = Field("samples", description="what weights are shares of")
    quarantine: QuarantineConfig = QuarantineConfig()
    reader_threads: PositiveInt = Field(2, description="decoding threads a rank; the order does not depend on it")
    prefetch: PositiveInt = Field(4, description="micro-batches decoded ahead")
    asr_instruction: str = Field("Transcribe the speech.", description="text that follows the audio of an ASR sample")

    @property
    def nominal_batch(self) -> tuple[int, int]:
        """Batch of a step and of a micro-batch as DeepSpeed is told them: samples, or micro-batches under a budget."""
        if self.budget is not None:
            return self.budget.micro_batches, 1
        return self.global_batch, self.micro_batch


class LrConfig(Section):
    """Peak learning rate of each part; a part the stage freezes ignores its rate (U8)."""

    adapters: PositiveFloat = 1e-4
    lora: PositiveFloat = 1e-4
    t2c: PositiveFloat = 5e-4
    denoising: PositiveFloat = 2e-4
    echo: PositiveFloat = 2e-4
    align: PositiveFloat | None = Field(
        None,
        description="what the alignment phase trains (Stage I: adapters, Stage III: Denoising Adapter), which then is "
        "a cycle of its own; None: one cycle a run",
    )


class OptimConfig(Section):
    """AdamW, linear warm-up, cosine decay (U7)."""

    lr: LrConfig = LrConfig()
    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    warmup_steps: int = Field(0, ge=0)
    hold_steps: int = Field(0, ge=0, description="steps at the peak rate between warm-up and decay")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the last step over the peak")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    clip: PositiveFloat = Field(1.0, description="global gradient norm")


class EngineConfig(Section):
    """How a step runs, and what a run leaves behind."""

    deepspeed: str = Field(description="DeepSpeed JSON, file path")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware multiplies it fast, else fp32")
    frozen_placement: Literal["shard", "replicate"] = Field(
        "replicate", description="frozen weights: ZeRO-3 partitions, or whole on each rank and outside ZeRO-3"
    )
    activation_checkpointing: bool = False
    validate_every: int = Field(0, ge=0, description="steps; 0 validates at the end only")
    checkpoint_every: int = Field(0, ge=0, description="steps; 0 saves at the end only")
    async_save: bool = Field(True, description="write checkpoints behind the next steps, from a copy in host memory")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="steps; checkpoints at multiples of it stay for good; 0: none does")
    keep_best: str | None = Field(
        None, description="metric, such as valid/loss/total, whose lowest value keeps its checkpoint"
    )
    log_every: PositiveInt = 1


class HealthConfig(Section):
    """What a run does about steps that would harm it, and about steps that never end."""

    on_bad_step: Literal["skip", "rewind", "stop"] = Field(
        "skip",
        description="a loss or gradient that is not finite, or a spike: pass over the step, go back to the last "
        "checkpoint and on behind the step's data, or stop",
    )
    max_bad_steps: int = Field(10, ge=0, description="bad steps in a row that are passed over before the run stops")
    max_rewinds: int = Field(3, ge=0, description="times that one attempt goes back before it stops")
    spike_sigma: float = Field(
        0,
        ge=0,
        description="standard deviations above the recent mean that make a loss a spike; 0: none is (6 is usual)",
    )
    spike_window: PositiveInt = Field(128, description="good steps that the mean is taken over")
    hang_factor: float = Field(
        20, ge=0, description="a step that takes so many times the 95th percentile of recent ones hangs; 0: none does"
    )
    hang_least_s: PositiveFloat = Field(
        300, description="seconds that every step may take; before 8 were timed, 10 times"
    )


def _workers(value: Any, check: Callable[[Any], Any]) -> Any:
    """One error, at the key itself, for both forms."""
    try:
        found = check(tuple(value) if isinstance(value, list) else value)
    except ValidationError:
        found = 0
    least, most = found if isinstance(found, tuple) else (found, found)
    if not 0 < least <= most:
        raise ValueError("a whole number above 0, or a range such as [2, 4]")
    return found


class ScalingConfig(Section):
    """What Ray Train starts."""

    workers: Annotated[int | tuple[int, int], WrapValidator(_workers)] = Field(
        2,
        description="ranks; [least, most] takes as many as there is room for and the batch divides by",
    )
    gpus_per_worker: float = Field(0, ge=0)
    cpus_per_worker: PositiveFloat = 1
    max_failures: int = Field(
        0,
        ge=0,
        description="failures that are survived: of a worker or its node, and as many of the driver",
    )
    max_start_failures: int = Field(
        2, ge=0, description="the same for failures before the first step: no room, a worker that cannot start"
    )
    collective_timeout_s: PositiveInt = 1800

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and most workers; the same number twice where it is fixed."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


class TrackingConfig(Section):
    """Where MLflow keeps the run."""

    uri: str | None = Field(None, description="MLflow tracking URI; None is a SQLite file under the run's storage")
    experiment: str = "echox"
    parent_run: str | None = Field(None, description="name of the parent run that groups the stages; None is `name`")
    system_metrics: bool = True
    deliver_hours: float = Field(
        12.0, ge=0, description="how long after its end a run goes on to try a server that does not answer"
    )


class InitConfig(Section):
    """Weights a stage starts from: run folders or checkpoint folders of earlier stages."""

    s2t: str | None = None
    t2c: str | None = None


class Recipe(Section):
    """One run: a stage at a scale."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run folder below storage, and MLflow name")
    stage: StageName
    scale: str = Field(description="demo, 3b, 8b or your own; a tag to compare runs by")
    seed: int = 17
    storage: str = Field("runs", description="folder of runs; on a cluster, one that every node sees")
    model: ModelConfig
    init: InitConfig = InitConfig()
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    health: HealthConfig = HealthConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def align_steps(self) -> int:
        """First steps of the stage that train a single part, and not yet what the stage is for."""
        steps = {"s2t": self.model.ctc.align_steps, "echo": self.model.echo.denoising.align_steps}
        return steps.get(self.stage, 0)

    @model_validator(mode="after")
    def _parts_of_the_stage(self, info: ValidationInfo) -> Recipe:
        # The loader runs these rules itself, to report them together with mistakes in single keys.
        if info.context and info.context.get("cross_checks") is False:
            return self
        breaches = cross_checks(self)
        if breaches:
            raise ValueError("\n".join(f"{breach.rule}; {breach.fix}" for breach in breaches))
        return self


def worker_counts(recipe: Recipe) -> tuple[int, ...]:
    """The numbers of workers within `scaling.workers` that the recipe's batch divides by, ascending."""
    data, (least, most) = recipe.data, recipe.scaling.bounds
    portions = data.global_batch / data.micro_batch if data.budget is None else data.budget.micro_batches
    return tuple(count for count in range(least, most + 1) if portions % count == 0)


class Breach(NamedTuple):
    """A broken rule that spans sections: the keys it involves, what is wrong with their values, what to write."""

    keys: tuple[str, ...]
    rule: str
    fix: str


def cross_checks(recipe: Recipe) -> list[Breach]:
    """Every rule that spans sections and that this recipe breaks; empty for a recipe that can run."""
    return [*_batch_rules(recipe), *_schedule_rules(recipe), *_stage_rules(recipe), *_model_rules(recipe)]


def _batch_rules(recipe: Recipe) -> list[Breach]:
    found: list[Breach] = []
    data, scaling = recipe.data, recipe.scaling
    (least, most), legal = scaling.bounds, worker_counts(recipe)
    batch_key = "data.global_batch" if data.budget is None else "data.budget.micro_batches"
    if least < most and (least not in legal or most not in legal):
        counts = ", ".join(str(count) for count in legal) or "none"
        found.append(
            Breach(
                (batch_key, "data.micro_batch", "scaling.workers"),
                f"scaling.workers=[{least}, {most}]: of these counts the batch divides by {counts}",
                f"set it to [{legal[0]}, {legal[-1]}]" if len(legal) > 1 else f"change it or {batch_key}",
            )
        )
    elif least == most and data.budget is not None and not legal:
        found.append(
            Breach(
                ("data.budget.micro_batches", "scaling.workers"),
                f"data.budget.micro_batches={data.budget.micro_batches} is not a multiple of scaling.workers={least}",
                f"set it to a multiple of {least}, best one that many numbers divide, such as 24 or 48",
            )
        )
    elif least == most and not legal:
        per_step = data.micro_batch * least
        found.append(
            Breach(
                ("data.global_batch", "data.micro_batch", "scaling.workers"),
                f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch * scaling.workers = "
                f"{data.micro_batch} * {least} = {per_step}",
                f"set data.global_batch to a multiple of {per_step}, or lower data.micro_batch",
            )
        )
    if scaling.gpus_per_worker not in (0, 1):
        found.append(
            Breach(
                ("scaling.gpus_per_worker",),
                f"scaling.gpus_per_worker={scaling.gpus_per_worker:g}, but a worker is one rank with one GPU or none",
                "set it to 1, and scaling.workers to the number of GPUs",
            )
        )
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and (not all(weighted) or any(source.repeat > 1 for source in data.train)):
        found.append(
            Breach(
                ("data.train",),
                "data.train mixes weight with repeat: sources are blended by weight, or read as one union",
                "give every source a weight and none a repeat, or no source a weight",
            )
        )
    for group in ("train", "valid"):
        seen: dict[tuple[str, str], int] = {}
        for index, source in enumerate(getattr(data, group)):
            first = seen.setdefault((source.path, source.task), index)
            if first != index:
                found.append(
                    Breach(
                        (f"data.{group}",),
                        f"data.{group}.{index} repeats data.{group}.{first} ({source.path}, {source.task})",
                        f"remove it, and set data.{group}.{first}.repeat to see the source more often",
                    )
                )
    return found


def _schedule_rules(recipe: Recipe) -> list[Breach]:
    found: list[Breach] = []
    optim = recipe.optim
    if optim.warmup_steps >= optim.steps:
        found.append(
            Breach(
                ("optim.warmup_steps", "optim.steps"),
                f"optim.warmup_steps={optim.warmup_steps} leaves no step after warm-up",
                f"keep it below optim.steps={optim.steps}",
            )
        )
    if recipe.align_steps >= optim.steps:
        key, loss = {
            "s2t": ("model.ctc.align_steps", "text"),
            "echo": ("model.echo.denoising.align_steps", "echo"),
        }[recipe.stage]
        found.append(
            Breach(
                (key, "optim.steps", "stage"),
                f"{key}={recipe.align_steps} leaves no step for the {loss} loss",
                f"keep it below optim.steps={optim.steps}",
            )
        )
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            found.append(
                Breach(("optim.betas",), f"optim.betas.{index}={beta:g} is outside [0, 1)", "write [0.9, 0.95]")
            )
    return found


def _stage_rules(recipe: Recipe) -> list[Breach]:
    found: list[Breach] = []
    stage, model = recipe.stage, recipe.model
    if stage != "t2c" and model.speech_encoder is None:
        found.append(
            Breach(
                ("stage", "model.speech_encoder"),
                f"stage={stage} hears speech, but model.speech_encoder is absent",
                "set model.speech_encoder.path",
            )
        )
    if stage != "s2t" and model.t2c is None:
        found.append(
            Breach(
                ("stage", "model.t2c"),
                f"stage={stage} speaks units, but model.t2c is absent",
                "set model.t2c.prefix, model.t2c.unit_header and model.t2c.unit_language",
            )
        )
    if stage == "echo" and not model.random_init:
        for part in ("s2t", "t2c"):
            if getattr(recipe.init, part) is None:
                found.append(
                    Breach(
                        ("stage", f"init.{part}", "model.random_init"),
                        f"stage=echo starts from a trained {part} stage, but init.{part} is absent",
                        f"set init.{part} to a run folder or a checkpoint of that stage",
                    )
                )
    allowed = {"s2t": ("asr", "sqa"), "t2c": ("tts",), "echo": ("asr", "sqa")}[stage]
    for group in ("train", "valid"):
        for index, source in enumerate(getattr(recipe.data, group)):
            if source.task not in allowed:
                key = f"data.{group}.{index}.task"
                found.append(
                    Breach(
                        ("stage", key), f"{key}={source.task} does not fit stage={stage}", f"use {' or '.join(allowed)}"
                    )
                )
    return found


def _model_rules(recipe: Recipe) -> list[Breach]:
    found: list[Breach] = []
    t2c, cuts = recipe.model.t2c, recipe.model.echo.segmentation
    if t2c is not None and t2c.width % (2 * t2c.heads):
        found.append(
            Breach(
                ("model.t2c.width", "model.t2c.heads"),
                f"model.t2c.width={t2c.width} does not split into {t2c.heads} heads of even width (rotary positions)",
                f"set model.t2c.width to a multiple of {2 * t2c.heads}",
            )
        )
    if cuts.mode == "trigger" and cuts.min_tokens > cuts.max_wait:
        found.append(
            Breach(
                ("model.echo.segmentation.min_tokens", "model.echo.segmentation.max_wait"),
                f"model.echo.segmentation.min_tokens={cuts.min_tokens} is above max_wait={cuts.max_wait}",
                "keep min_tokens at or below max_wait",
            )
        )
    return found
