"""Defines the typed tree of one recipe: every setting of a run, its unit, its default and the reason for it.

Only shapes and rules live here; reading YAML, overrides and error sentences are in `echox.config.load`.
"U1" to "U27" number the paper's unknowns; the comments name the default and the alternatives. Descriptions and
docstrings are also the text of `README.md` beside this file, which `echox recipe keys --write` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

from echox.config.languages import ENGLISH, Language
from echox.config.locations import unfit_places
from echox.config.model_schema import ModelConfig, T2cConfig
from echox.config.paths import is_url
from echox.config.section import Change, Free, Guarded, Section, own_mark, section_in

StageName = Literal["s2t", "t2c", "echo"]
Precision = Literal["auto", "bf16", "fp32"]


class SourceConfig(Section):
    """One folder of shards."""

    path: str = Field(description="folder of shards, or a name below $ECHOX_CACHE/data")
    task: Literal["sqa", "asr", "tts"] = Field(
        description="what a sample is: sqa, a spoken question and its answer; asr, speech and its transcript (both for "
        "the stages s2t and echo); tts, a text and its units (for t2c)"
    )
    repeat: PositiveInt = Field(1, description="passes over this source in one epoch, where sources are one union")
    weight: PositiveFloat | None = Field(
        None, description="share of the stream; given to all sources, they are blended without end, each wrapping alone"
    )


class BudgetConfig(Section):
    """What a micro-batch may cost, in place of a fixed number of samples (U9).

    The cost is the sum of the samples' lengths, or rows times the longest where `model.layout` is padded. A sample's
    tokens are estimated: 25 speech vectors a second and a quarter of its characters, or its units and those.
    """

    by: Literal["seconds", "tokens"] = Field(description="what the length of a sample is counted in")
    size: PositiveFloat = Field(
        description="most that one forward on one rank may cost, in seconds or tokens; a longer sample goes alone"
    )
    micro_batches: PositiveInt = Field(
        description="micro-batches in one optimizer step, over all ranks; any number of ranks that divides it will do"
    )


class QuarantineConfig(Section):
    """How many damaged samples a run may drop before it stops."""

    samples: int | None = Field(None, ge=0, description="dropped samples in all; null is any number")
    share: float = Field(0.01, ge=0, le=1, description="dropped share of the samples seen, of 1,000 at least")


class DataConfig(Section):
    """What is read, and in what portions."""

    train: Guarded[tuple[SourceConfig, ...]] = Field(min_length=1, description="sources to train on")
    valid: Free[tuple[SourceConfig, ...]] = Field((), description="sources to validate on; without any, nothing is")
    global_batch: Guarded[PositiveInt] = Field(
        128, description="samples in one optimizer step, over all ranks (U7); no effect under a budget"
    )
    micro_batch: Free[PositiveInt] = Field(
        16, description="samples in one forward on one rank, as memory allows; no effect under a budget"
    )
    batch_for: Guarded[PositiveInt | None] = Field(
        None,
        description="ranks that global_batch is meant for: on n ranks a step has global_batch * n / batch_for samples, "
        "as many for each rank; learning rates and optim.steps stay; null: global_batch on any number of ranks",
    )
    budget: Guarded[BudgetConfig | None] = Field(None, description="takes the place of global_batch and micro_batch")
    window_shards: Guarded[PositiveInt] = Field(
        16, description="shards whose samples are shuffled together and read ahead"
    )
    pool: Guarded[PositiveInt | None] = Field(
        None,
        description="optimizer steps whose samples are sorted by length together: more leave less padding, and lengths "
        "that differ less within a step; null is the whole window",
    )
    weight_by: Guarded[Literal["samples", "seconds", "tokens"]] = Field(
        "samples", description="what weights are shares of"
    )
    quarantine: Free[QuarantineConfig] = QuarantineConfig()
    reader_threads: Free[PositiveInt] = Field(2, description="decoding threads a rank; the order does not depend on it")
    prefetch: Free[PositiveInt] = Field(4, description="micro-batches decoded ahead")
    asr_instruction: str = Field("Transcribe the speech.", description="text that follows the audio of an ASR sample")
    history_tokens: int = Field(
        1024,
        ge=0,
        description="most tokens of the dialogue before a question (`turns` of an sqa sample) in its prompt, counted "
        "in the turns' text; the oldest turns are dropped whole, an answer with its question, and counted in "
        "`data/turns_dropped`, a system turn at the beginning last; a budget does not count them; 0: no dialogue",
    )
    history: Literal["text", "speech"] = Field(
        "text",
        description="earlier turns in the prompt: text: all as text; speech: user turns that have audio in the shards "
        "(`--history-audio` of `echox shards build`) as speech vectors, counted as 25 tokens a second",
    )

    @property
    def nominal_batch(self) -> tuple[int, int]:
        """Batch of a step and of a micro-batch as DeepSpeed is told them: samples, or micro-batches under a budget."""
        if self.budget is not None:
            return self.budget.micro_batches, 1
        return self.global_batch, self.micro_batch

    def on(self, ranks: int) -> DataConfig:
        """The section as it holds on a number of ranks: with the batch of that number where it grows with them."""
        if self.batch_for is None or self.budget is not None:
            return self
        return self.model_copy(update={"global_batch": self.global_batch // self.batch_for * ranks, "batch_for": ranks})


class LrConfig(Section):
    """Peak learning rate of each part; a part the stage freezes ignores its rate (U8).

    The paper gives none. The defaults are cautious, most of all for LoRA in Stage III, which is already trained.
    """

    adapters: PositiveFloat = Field(
        1e-4, description="alignment adapter, CTC head and shrink adapter, Stage I; in Stage III, where it trains them"
    )
    lora: PositiveFloat = Field(1e-4, description="LoRA of the LLM, Stages I and III")
    t2c: PositiveFloat = Field(
        5e-4, description="T2C decoder, Stage II; small and trained from scratch, it bears a higher rate"
    )
    denoising: PositiveFloat = Field(2e-4, description="Denoising Adapter, Stage III")
    echo: PositiveFloat = Field(2e-4, description="Echo decoder, Stage III; it starts as the T2C decoder")
    align: PositiveFloat | None = Field(
        None,
        description="what the alignment phase trains (Stage I: adapters, Stage III: Denoising Adapter), which then is "
        "a cycle of its own; null: one cycle a run",
    )


class OptimConfig(Section):
    """AdamW, linear warm-up, cosine decay (U7).

    The defaults of `betas`, `weight_decay` and `clip` are those of Qwen's fine-tuning script, which the authors say
    they follow.
    """

    lr: LrConfig = LrConfig()
    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    warmup_steps: int = Field(
        0, ge=0, description="optimizer steps in which the rate rises to its peak; 1 in 100 of `steps` is usual"
    )
    hold_steps: int = Field(0, ge=0, description="steps at the peak rate between warm-up and decay")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the last step over the peak")
    betas: tuple[float, float] = Field(
        (0.9, 0.95),
        description="how much of the running mean of gradients, and of their squares, a step keeps; each below 1",
    )
    eps: PositiveFloat = Field(
        1e-8, description="added to the root of the mean square before dividing by it; 1e-8 is AdamW's usual value"
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="share of a weight that a step takes off it, times the learning rate; vectors do not decay",
    )
    clip: PositiveFloat = Field(1.0, description="global gradient norm above which the gradient is scaled down to it")


class EngineConfig(Section):
    """How a step runs, and what a run leaves behind."""

    deepspeed: Free[str] = Field(
        description="DeepSpeed JSON, file path; `ds_configs/README.md` describes those of the project"
    )
    precision: Precision = Field("auto", description="auto: bf16 where the hardware multiplies it fast, else fp32")
    frozen_placement: Free[Literal["shard", "hpz", "replicate", "auto"]] = Field(
        "replicate",
        description="frozen weights: replicate: whole on each rank, nothing of them is sent; shard: ZeRO-3 partitions, "
        "gathered for every use; hpz: partitions within each node besides, so that nothing of them crosses nodes after "
        "the first step; auto: replicate where they take a quarter of a rank's memory at most, else hpz, on one node "
        "shard",
    )
    activation_checkpointing: Free[bool] = Field(
        False, description="compute the LLM's activations again in the backward pass: less memory, more time"
    )
    deterministic: Free[bool] = Field(
        False,
        description="on a GPU, the same bits from the same start; slower. A CPU gives them anyway",
    )
    compile: Free[bool] = Field(
        False,
        description="compile the pointwise parts of the LLM's and the decoders' layers, rotary embedding and gated "
        "activation: fewer kernels; needs a C compiler on the nodes",
    )
    validate_every: Free[int] = Field(0, ge=0, description="steps; 0 validates at the end only")
    checkpoint_every: Free[int] = Field(0, ge=0, description="steps; 0 saves at the end only")
    async_save: Free[bool] = Field(
        True, description="write checkpoints behind the next steps, from a copy in host memory"
    )
    keep: Free[PositiveInt] = Field(
        2, description="newest checkpoints kept; 2, so that a run can go on where one is damaged"
    )
    keep_every: Free[int] = Field(
        0, ge=0, description="steps; checkpoints at multiples of it stay for good; 0: none does"
    )
    keep_best: Free[str | None] = Field(
        None, description="metric, such as valid/loss/total, whose lowest value keeps its checkpoint"
    )
    log_every: Free[PositiveInt] = Field(
        1, description="steps; metrics are read from the device and logged at multiples of it, and at the first step"
    )


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
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs of a worker, 1 or 0 (a worker is one rank); 0 trains on the CPU"
    )
    cpus_per_worker: PositiveFloat = Field(
        1, description="CPU cores that Ray sets aside for a worker; count its reader threads in"
    )
    max_failures: int = Field(
        0,
        ge=0,
        description="failures that are survived: of a worker or its node, and as many of the driver",
    )
    max_start_failures: int = Field(
        2, ge=0, description="the same for failures before the first step, such as a worker that cannot start"
    )
    queue_timeout_s: PositiveFloat | None = Field(
        None,
        description="seconds that a run waits for room on a cluster that others use too; null: as long as it takes",
    )
    priority: int = Field(
        0, description="of two runs that wait for room on a cluster, the higher goes first; none stops one that trains"
    )
    collective_timeout_s: PositiveInt = Field(
        1800,
        description="seconds that a rank waits for the others in a collective operation before it fails; 1800 is "
        "torch's default on a CPU",
    )

    least_busbw: float = Field(
        0.0,
        ge=0,
        description="refuse to start where the bus bandwidth of an all-reduce between all ranks is lower, GB/s; 0 only "
        "reports it",
    )

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and most workers; the same number twice where it is fixed."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


class TrackingConfig(Section):
    """Where MLflow keeps the run."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI; null is $MLFLOW_TRACKING_URI, else a SQLite file under the run's storage",
    )
    experiment: str = Field(
        "echox", description="MLflow experiment that holds the run; $MLFLOW_EXPERIMENT_NAME takes the default's place"
    )
    parent_run: str | None = Field(None, description="name of the parent run that groups the stages; null is `name`")
    system_metrics: bool = Field(True, description="log CPU, memory and GPU memory of each node every 10 seconds")
    deliver_hours: float = Field(
        12.0, ge=0, description="how long after its end a run goes on to try a server that does not answer, hours"
    )


class InitConfig(Section):
    """Weights a stage starts from: run folders or checkpoint folders of earlier stages."""

    s2t: str | None = Field(None, description="Stage I run; Stage III needs it, Stage I may go on from it")
    t2c: str | None = Field(None, description="Stage II run; Stage III needs it, as teacher and as first Echo decoder")


class Recipe(Section):
    """One run: a stage at a scale."""

    name: Free[str] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="run folder below storage, and MLflow name: letters, digits, dots, dashes and underscores",
    )
    stage: StageName = Field(description="s2t: Stage I, speech to text; t2c: Stage II, text to units; echo: Stage III")
    scale: Free[str] = Field(description="demo, 3b, 8b or your own; a tag to compare runs by")
    language: Language = Field(
        ENGLISH,
        description="language heard and spoken, by Whisper's code: its full stop is the trigger's, the judge of an "
        "evaluation is told it, and texts are compared by its rules",
    )
    seed: Guarded[int] = Field(17, description="random seed of new weights, of dropout and of the order of the data")
    storage: Free[str] = Field(
        "runs", description="folder of runs, on a cluster one that every node sees; or URL such as s3://bucket/runs"
    )
    model: ModelConfig
    init: Guarded[InitConfig] = InitConfig()
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    health: Free[HealthConfig] = HealthConfig()
    scaling: Free[ScalingConfig] = ScalingConfig()
    tracking: Free[TrackingConfig] = TrackingConfig()

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


def change_of(key: str, schema: type[Section] = Recipe) -> Change:
    """What a change of a dotted key means; a key that the schema does not know has the mark of its section."""
    mark, section = Change.REFUSED, section_in(schema)
    for part in key.split("."):
        field = section.model_fields.get(part) if section else None
        if field is None:
            break
        mark = own_mark(field) or mark
        section = section_in(field.annotation)
    return mark


def worker_counts(recipe: Recipe) -> tuple[int, ...]:
    """The numbers of workers within `scaling.workers` that the recipe's batch divides by, ascending."""
    least, most = recipe.scaling.bounds
    return tuple(count for count in range(least, most + 1) if _divides(recipe.data.on(count), count))


def _divides(data: DataConfig, ranks: int) -> bool:
    step_batch, micro_batch = data.nominal_batch
    return step_batch % (micro_batch * ranks) == 0


def batch_sentence(recipe: Recipe, ranks: int) -> str | None:
    """What a batch that grows with the ranks means on so many; None where it is what the recipe says."""
    data, now = recipe.data, recipe.data.on(ranks)
    if data.batch_for is None or now.global_batch == data.global_batch:
        return None
    steps, times = recipe.optim.steps, ranks / data.batch_for
    return (
        f"a step has {now.global_batch:,} samples on {ranks} ranks, {times:g} times the {data.global_batch:,} for "
        f"{data.batch_for}, and the learning rates stay: optim.steps={max(1, round(steps / times))} is as many samples "
        f"as {steps} were there"
    )


class Breach(NamedTuple):
    """A broken rule that spans sections: the keys it involves, what is wrong with their values, what to write."""

    keys: tuple[str, ...]
    rule: str
    fix: str


def cross_checks(recipe: Recipe) -> list[Breach]:
    """Every rule that spans sections and that this recipe breaks; empty for a recipe that can run."""
    rules = (_batch_rules, _schedule_rules, _stage_rules, _model_rules, _place_breaches)
    return [breach for rule in rules for breach in rule(recipe)]


def _place_breaches(recipe: Recipe) -> list[Breach]:
    data = {
        f"data.{group}.{index}.path": source.path
        for group in ("train", "valid")
        for index, source in enumerate(getattr(recipe.data, group))
    }
    unfit = unfit_places(recipe.storage, recipe.tracking.uri, data)
    found = [Breach((each.key,), each.rule, each.fix) for each in unfit]
    every = recipe.model.echo.refresh_every
    if is_url(recipe.storage) and every:
        rule = f"model.echo.refresh_every={every} needs a folder of runs that every node sees"
        found.append(Breach(("storage", "model.echo.refresh_every"), rule, "set it to 0, or mount the storage"))
    return found


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
    elif data.batch_for is not None and data.budget is None and not legal:
        per_step = data.micro_batch * data.batch_for
        found.append(
            Breach(
                ("data.global_batch", "data.micro_batch", "data.batch_for"),
                f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch * data.batch_for = "
                f"{data.micro_batch} * {data.batch_for} = {per_step}",
                f"set data.global_batch to a multiple of {per_step}, or lower data.micro_batch",
            )
        )
    elif least == most and not legal:
        per_step = data.micro_batch * least
        found.append(
            Breach(
                ("data.global_batch", "data.micro_batch", "scaling.workers"),
                f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch * scaling.workers = "
                f"{data.micro_batch} * {least} = {per_step}",
                f"set data.global_batch to a multiple of {per_step}, {_smaller(data, least)}",
            )
        )
    found += worker_rules(scaling)
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


def worker_rules(scaling: ScalingConfig) -> list[Breach]:
    """What no worker can have."""
    if scaling.gpus_per_worker in (0, 1):
        return []
    rule = f"scaling.gpus_per_worker={scaling.gpus_per_worker:g}, but a worker is one rank with one GPU or none"
    return [Breach(("scaling.gpus_per_worker",), rule, "set it to 1, and scaling.workers to the number of GPUs")]


def _smaller(data: DataConfig, ranks: int) -> str:
    """The other way out where a batch does not divide: smaller micro-batches, or a batch that grows with the ranks."""
    each = data.global_batch // ranks
    fits = [size for size in range(1, data.micro_batch) if data.global_batch % ranks == 0 and each % size == 0]
    if fits:
        return f"data.micro_batch={fits[-1]}, or data.batch_for to the ranks that the batch is meant for"
    return "or data.batch_for to the ranks that the batch is meant for"


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
    if stage == "t2c" and model.t2c is not None and model.t2c.text_table == "own":
        found.append(
            Breach(
                ("stage", "model.t2c.text_table"),
                "stage=t2c starts from nothing that has a text table of its own (model.t2c.text_table=own)",
                "set model.t2c.text_table to head or null",
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
    speech, data = model.speech_encoder, recipe.data
    heard = data.history_tokens > 0 and data.history == "speech"
    if stage != "t2c" and speech is not None and speech.precomputed and heard:
        found.append(
            Breach(
                ("data.history", "model.speech_encoder.precomputed"),
                "data.history=speech hears earlier turns, of which the shards hold no encoder output "
                "(model.speech_encoder.precomputed)",
                "set data.history to text, or model.speech_encoder.precomputed to false",
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
    if recipe.model.echo.refresh_every and recipe.model.echo.pseudo_text != "generated":
        found.append(
            Breach(
                ("model.echo.refresh_every", "model.echo.pseudo_text"),
                f"model.echo.refresh_every={recipe.model.echo.refresh_every} answers again, but "
                f"model.echo.pseudo_text={recipe.model.echo.pseudo_text} reads no answers",
                "set model.echo.pseudo_text to generated, or leave refresh_every at 0",
            )
        )
    if t2c is not None:
        found += _place_rules(t2c)
    if t2c is not None and t2c.width % (2 * t2c.heads):
        found.append(
            Breach(
                ("model.t2c.width", "model.t2c.heads"),
                f"model.t2c.width={t2c.width} does not split into {t2c.heads} heads of even width (rotary positions)",
                f"set model.t2c.width to a multiple of {2 * t2c.heads}",
            )
        )
    found += _label_rules(recipe)
    if cuts.mode == "trigger" and cuts.min_tokens > cuts.max_wait:
        found.append(
            Breach(
                ("model.echo.segmentation.min_tokens", "model.echo.segmentation.max_wait"),
                f"model.echo.segmentation.min_tokens={cuts.min_tokens} is above max_wait={cuts.max_wait}",
                "keep min_tokens at or below max_wait",
            )
        )
    return found


def _place_rules(t2c: T2cConfig) -> list[Breach]:
    """Where a T2C decoder places its text."""
    found: list[Breach] = []
    by_units, by_words, window = (f"model.t2c.{key}" for key in ("units_per_character", "text_stride", "window_units"))
    if t2c.units_per_character is not None and t2c.text_stride is not None:
        found.append(Breach((by_units, by_words), f"{by_units} and {by_words} both place the text", "leave one out"))
    if t2c.window_units is not None and t2c.units_per_character is None:
        found.append(
            Breach(
                (window, by_units),
                f"{window}={t2c.window_units:g} is a distance in units, and without {by_units} text has no place there",
                f"set {by_units}, or {window} to null",
            )
        )
    return found


def _label_rules(recipe: Recipe) -> list[Breach]:
    echo, labels = recipe.model.echo, "model.echo.labels"
    found: list[Breach] = []
    if recipe.stage != "echo":
        return found
    if echo.labels == "annotated" and echo.pseudo_text != "reference":
        found.append(
            Breach(
                (labels, "model.echo.pseudo_text"),
                f"{labels}=annotated are units of the reference answer, and model.echo.pseudo_text={echo.pseudo_text} "
                "is another text",
                "set model.echo.pseudo_text to reference",
            )
        )
    if echo.labels == "annotated" and echo.segmentation.mode != "none":
        found.append(
            Breach(
                (labels, "model.echo.segmentation.mode"),
                f"{labels}=annotated are units of whole answers, and model.echo.segmentation.mode="
                f"{echo.segmentation.mode} cuts them",
                "set model.echo.segmentation.mode to none",
            )
        )
    if echo.labels == "cached" and echo.pseudo_text not in ("generated", "reference"):
        found.append(
            Breach(
                (labels, "model.echo.pseudo_text"),
                f"{labels}=cached keeps the labels of a text that is fixed, and model.echo.pseudo_text="
                f"{echo.pseudo_text} changes with the weights",
                f"set model.echo.pseudo_text to generated or reference, or {labels} to drafted",
            )
        )
    placement = recipe.engine.frozen_placement
    if echo.labels == "cached" and placement != "replicate":
        found.append(
            Breach(
                (labels, "engine.frozen_placement"),
                f"{labels}=cached lets each rank ask the teacher when it must, and engine.frozen_placement={placement} "
                f"{'may make' if placement == 'auto' else 'makes'} all ranks gather it together",
                f"set engine.frozen_placement to replicate, or {labels} to teacher",
            )
        )
    return found
