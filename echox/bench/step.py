"""Measures a whole training step against a naive loop, and without each technique in turn, all in one run.

Weights are random at a recipe's true shapes, lengths log-normal and imposed where random weights would not end, so
that nothing needs to be downloaded. Machines differ and shared ones vary while they work: contenders take turns, what
counts is processor time and the ratio of neighbours, and beside each time stands what its FLOP take at the speed of
this machine's matrix products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from echox.bench.counting import flop_counter
from echox.bench.imposed import imposed
from echox.bench.micro_batch import CORPUS_CLASSES, Load, Vocabulary, micro_batch
from echox.bench.naive import naive_losses
from echox.bench.optimizer import PlainAdamW, total_loss
from echox.bench.techniques import TECHNIQUES, Technique, device_of, technique
from echox.builders.setup import TextTools, build_stage
from echox.device import best_device
from echox.engine.precision import resolve_precision, torch_dtype
from echox.errors import EchoXError

if TYPE_CHECKING:
    from echox.config.schema import Recipe

ENGINE, NAIVE = "engine", "naive loop"
LOSS_GAP = 1e-4
"""Largest relative difference of a loss in float32 without dropout."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One contender of a recipe.

    Attributes:
        name: the engine, the naive loop, or what the engine does without one of its techniques.
        ms: median milliseconds of a step: forward, backward, optimizer.
        cpu_s: median processor seconds of a step.
        predicted_ms: its matmul and attention FLOP at the measured speed of a matrix product.
        gflop: those FLOP, padding included.
        times: processor time over the engine's, of each pair of neighbouring steps; on a GPU, wall time.
        teacher_share: of the step's time; None where no teacher decodes.
        loss_gap: largest relative difference of a loss from the engine's, without dropout; None where the losses are
            not the same ones.
    """

    name: str
    ms: float
    cpu_s: float
    predicted_ms: float
    gflop: float
    times: list[float]
    teacher_share: float | None
    loss_gap: float | None

    @property
    def ratio(self) -> float:
        """Median of the pairs."""
        return statistics.median(self.times)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A recipe's contenders, the engine first.

    Attributes:
        recipe: its name.
        samples, audio_s, tokens: of a step: rows, seconds of audio, and useful positions of the LLM, or of T2C.
        padding_share: of the positions that the engine computes on.
        rows: the contenders.
    """

    recipe: str
    samples: int
    audio_s: float
    tokens: float
    padding_share: float
    rows: list[StepResult]


def run(
    recipe: Recipe,
    load: Load | None = None,
    *,
    repeats: int = 5,
    seed: int = 0,
    techniques: Sequence[Technique] = TECHNIQUES,
) -> StepReport:
    """Time the stage of `recipe` at its true shapes, on a GPU where there is one.

    Args:
        recipe: its weights, data and earlier stages are not read; `model.random_init` is taken to be set.
        load: the micro-batch.
        repeats: timed steps of each contender, after one that is not.
        seed: of weights and lengths.
        techniques: each is switched off in turn, where it applies.

    Raises:
        EchoXError: a contender's losses are not those of the engine.
    """
    load = load or Load()
    torch.manual_seed(seed)
    stage, batch = synthetic_batch(recipe, load, seed)
    device = torch.device(best_device())
    stage, batch = stage.to(device), batch.to(device)
    contenders = _contenders(stage, batch, techniques)
    with imposed(stage, load.words_per_token):
        gaps = _loss_gaps(contenders, stage, batch)
        stage.train()
        optimizer = PlainAdamW(stage)
        flops = {each.name: _counted(each, stage, batch, optimizer) for each in contenders}
        tokens, padding = _useful(stage)
        timed: dict[str, list[_Timed]] = {each.name: [] for each in contenders}
        for _ in range(repeats):
            for each in contenders:
                timed[each.name].append(_timed(each, stage, batch, optimizer))
    speed = matmul_flops(device, next(p for p in stage.parameters()).dtype)
    rows = [_result(each.name, timed, flops[each.name], speed, gaps[each.name], device) for each in contenders]
    stats = batch.stats()
    return StepReport(
        recipe=recipe.name,
        samples=load.rows,
        audio_s=stats.get("audio_s", 0.0),
        tokens=tokens,
        padding_share=padding,
        rows=rows,
    )


def synthetic_batch(recipe: Recipe, load: Load, seed: int = 0) -> tuple[Any, Any]:
    """A recipe's stage with random weights, packed, and a micro-batch for it; both on the CPU."""
    recipe = without_alignment(recipe)
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"random_init": True, "layout": "packed"}),
            "init": type(recipe.init)(),
        }
    )
    text = TextTools.load(recipe)
    stage = build_stage(recipe, text, transcripts=range(CORPUS_CLASSES))
    vocabulary = Vocabulary(len(text.tokenizer), text.words, text.prompt.before, text.prompt.after)
    dtype = torch_dtype(resolve_precision(recipe.engine.precision))
    return stage, micro_batch(recipe, vocabulary, load, dtype, seed)


def without_alignment(recipe: Recipe) -> Recipe:
    """The recipe with none of the first steps that train a single part: they are not what a stage costs."""
    model = recipe.model
    denoising = model.echo.denoising.model_copy(update={"align_steps": 0})
    update = {
        "ctc": model.ctc.model_copy(update={"align_steps": 0}),
        "echo": model.echo.model_copy(update={"denoising": denoising}),
    }
    return recipe.model_copy(update={"model": model.model_copy(update=update)})


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product, the best of a few."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        finish(device)
        before = time.perf_counter()
        left @ right
        finish(device)
        seconds.append(time.perf_counter() - before)
    return float(2 * size**3 / min(seconds))


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Contender:
    """How the losses come about: the name, what holds meanwhile, and the function of stage and batch."""

    name: str
    without: Technique | None = None
    naive: bool = False
    same_losses: bool = True

    @contextmanager
    def losses(self, stage: Any, batch: Any) -> Iterator[Callable[[], dict[str, Any]]]:
        with nullcontext(batch) if self.without is None else self.without.off(stage, batch) as given:
            yield (lambda: naive_losses(stage, given, limit_ends=True)) if self.naive else (lambda: stage(given))


@dataclass(frozen=True)
class _Timed:
    ms: float
    cpu_s: float
    teacher_s: float


def _contenders(stage: Any, batch: Any, techniques: Sequence[Technique]) -> list[_Contender]:
    used = [each for each in techniques if each.applies(stage, batch)]
    untrimmed = technique("trimmed audio").applies(stage, batch)
    return [
        _Contender(ENGINE),
        _Contender(NAIVE, naive=True, same_losses=not untrimmed),
        *(_Contender(f"engine, {each.without}", each, same_losses=each.same_losses) for each in used),
    ]


def _loss_gaps(contenders: Sequence[_Contender], stage: Any, batch: Any) -> dict[str, float | None]:
    """The largest relative difference of a loss from the engine's, or None where other features are heard.

    The naive loop hears 30 s of every clip: where the engine trims them, it is compared with the engine that does not.
    """
    stage.eval()
    engine, found = _means(contenders[0], stage, batch), dict[str, float | None]()
    for each in contenders:
        wanted = engine
        if not each.same_losses:
            if not each.naive:
                found[each.name] = None
                continue
            wanted = _means(_Contender(ENGINE, technique("trimmed audio")), stage, batch)
        means = engine if each is contenders[0] else _means(each, stage, batch)
        gap = max(abs(means[name] - value) / max(abs(value), 1e-9) for name, value in wanted.items())
        found[each.name] = gap
        if next(stage.parameters()).dtype == torch.float32 and not gap <= LOSS_GAP:
            raise EchoXError(
                f"the losses of '{each.name}' differ from the engine's by {gap:.1e}: {means} for {wanted}",
                fix="do not trust these times; compare the two paths first",
            )
    return found


@torch.no_grad()
def _means(contender: _Contender, stage: Any, batch: Any) -> dict[str, float]:
    """Token means of the losses, without dropout; nothing that was found stays on the batch."""
    with contender.losses(stage, replace(batch)) as losses:
        return {name: float(term.total / term.count.clamp(min=1)) for name, term in losses().items()}


def _counted(contender: _Contender, stage: Any, batch: Any, optimizer: PlainAdamW) -> float:
    """FLOP of a step, which is also the one that is not timed."""
    with flop_counter() as counted:
        _timed(contender, stage, batch, optimizer)
    return float(counted.get_total_flops())


def _timed(contender: _Contender, stage: Any, batch: Any, optimizer: PlainAdamW) -> _Timed:
    device = device_of(stage)
    with contender.losses(stage, batch) as losses:
        finish(device)
        wall, cpu = time.perf_counter(), time.process_time()
        total_loss(stage, losses()).backward()
        optimizer.step()
        finish(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    teacher = stage.part_seconds()["teacher"] if hasattr(stage, "part_seconds") else 0.0
    return _Timed(wall * 1e3, cpu, teacher)


def _useful(stage: nn.Module) -> tuple[float, float]:
    """Real positions of the LLM, or of T2C, and the padding share, in the stage's last own forward."""
    from echox.models.work import counts_of

    known: Any = stage
    counts = counts_of([known.work])
    return counts.get("llm", counts.get("t2c", 0.0)), float(known.metrics()["perf/padding_share"])


def _result(
    name: str,
    timed: dict[str, list[_Timed]],
    flops: float,
    speed: float,
    gap: float | None,
    device: torch.device,
) -> StepResult:
    own, engine = timed[name], timed[ENGINE]

    def cost(one: _Timed) -> float:
        return one.ms if device.type == "cuda" else one.cpu_s

    teacher = statistics.median(one.teacher_s * 1e3 / one.ms for one in own)
    return StepResult(
        name=name,
        ms=statistics.median(one.ms for one in own),
        cpu_s=statistics.median(one.cpu_s for one in own),
        predicted_ms=flops / speed * 1e3,
        gflop=flops / 1e9,
        times=[cost(one) / cost(other) for one, other in zip(own, engine, strict=True)],
        teacher_share=teacher or None,
        loss_gap=gap,
    )


def table(reports: Sequence[StepReport]) -> str:
    """The reports as Markdown, one table each."""
    lines: list[str] = []
    for report in reports:
        engine = report.rows[0]
        seconds = engine.ms / 1e3
        lines += [
            f"### {report.recipe}: {report.samples} samples a step",
            "",
            f"The engine: {report.samples / seconds:.3g} samples/s, {report.audio_s / seconds:.3g} audio-s/s, "
            f"{report.tokens / seconds:,.0f} useful tokens/s, padding {report.padding_share:.0%}.",
            "",
            "| step | processor s | ms | predicted ms | GFLOP | teacher | times the engine (range) | loss gap |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *(_line(row) for row in report.rows),
            "",
        ]
    return "\n".join(lines).rstrip()


def _line(row: StepResult) -> str:
    teacher = "" if row.teacher_share is None else f"{row.teacher_share:.0%}"
    gap = "other losses" if row.loss_gap is None else f"{row.loss_gap:.0e}"
    ratio = "1" if row.name == ENGINE else f"{row.ratio:.2f} ({min(row.times):.2f} to {max(row.times):.2f})"
    return (
        f"| {row.name} | {row.cpu_s:.2f} | {row.ms:,.0f} | {row.predicted_ms:,.0f} | {row.gflop:,.0f} | {teacher} "
        f"| {ratio} | {gap} |"
    )
