"""Measures the speedup of packing: forward and backward of a recipe's stage on packed and on padded rows, in one run.

Weights are random and lengths log-normal, so that nothing needs to be downloaded. Machines differ and shared ones vary
while they work, so the result is the ratio of neighbouring runs, not a time.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from echox.audio.features import HOP, WINDOW
from echox.builders.setup import TextTools, build_stage
from echox.device import best_device
from echox.engine.precision import resolve_precision, torch_dtype
from echox.models.ragged import Layout
from echox.release.pretrained import encoder_width, mel_bins
from echox.stream.batch import SpeechBatch, UnitBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echox.config.schema import Recipe

LAYOUTS: tuple[Layout, Layout] = ("packed", "padded")
_CORPUS_CLASSES = 1000
"""CTC classes of `vocabulary: corpus`, and the tokens that transcripts are made of."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A synthetic micro-batch; lengths are log-normal around the medians given.

    Attributes:
        rows: samples.
        question_s: seconds of a spoken question.
        response: tokens of a text answer, or of the text that T2C reads.
        words: unit-language words of a T2C sample.
        sigma: standard deviation of the logarithm of a length.
    """

    rows: int = 12
    question_s: float = 1.4
    response: int = 20
    words: int = 70
    sigma: float = 0.4


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One stage in both layouts.

    Attributes:
        name: of the recipe.
        padding_share: of the positions that the padded layout computes.
        ms: median milliseconds of a forward and backward, by layout.
        speedups: padded time over packed time, of each pair of neighbouring runs.
        loss_gap: largest relative difference of a loss between the layouts, without dropout.
    """

    name: str
    padding_share: float
    ms: dict[str, float]
    speedups: list[float]
    loss_gap: float

    @property
    def speedup(self) -> float:
        """Median of the pairs."""
        return statistics.median(self.speedups)


def run(recipe: Recipe, load: Load | None = None, *, repeats: int = 5, seed: int = 0) -> StepResult:
    """Time the stage of `recipe` at its true shapes, on a GPU where there is one.

    Args:
        recipe: its weights, data and earlier stages are not read; `model.random_init` is taken to be set.
        load: the micro-batch.
        repeats: timed pairs, after one that is not.
        seed: of weights and lengths.
    """
    device = torch.device(best_device())
    torch.manual_seed(seed)
    stage, batch = synthetic_batch(recipe, load or Load(), seed)
    stage, batch = stage.to(device), batch.to(device)
    packed, padded = (_losses(stage, layout, batch) for layout in LAYOUTS)
    share = float(stage.metrics()["perf/padding_share"])
    stage.train()
    for layout in LAYOUTS:
        _step_ms(stage, layout, batch, device)
    pairs = [[_step_ms(stage, layout, batch, device) for layout in LAYOUTS] for _ in range(repeats)]
    return StepResult(
        name=recipe.name,
        padding_share=share,
        ms={layout: statistics.median(times) for layout, times in zip(LAYOUTS, zip(*pairs, strict=True), strict=True)},
        speedups=[slow / fast for fast, slow in pairs],
        loss_gap=max(abs(packed[name] - value) / max(abs(value), 1e-9) for name, value in padded.items()),
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
    stage = build_stage(recipe, text, transcripts=range(_CORPUS_CLASSES))
    dtype = torch_dtype(resolve_precision(recipe.engine.precision))
    return stage, _batch(recipe, text, load, dtype, torch.Generator().manual_seed(seed))


def without_alignment(recipe: Recipe) -> Recipe:
    """The recipe with none of the first steps that train a single part: they are not what a stage costs."""
    model = recipe.model
    denoising = model.echo.denoising.model_copy(update={"align_steps": 0})
    update = {
        "ctc": model.ctc.model_copy(update={"align_steps": 0}),
        "echo": model.echo.model_copy(update={"denoising": denoising}),
    }
    return recipe.model_copy(update={"model": model.model_copy(update=update)})


def table(results: Sequence[StepResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| recipe | padding, padded | packed ms | padded ms | speed-up (worst to best pair) | loss gap |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.padding_share:.0%} | {r.ms['packed']:.0f} | {r.ms['padded']:.0f} "
        f"| {r.speedup:.2f}× ({min(r.speedups):.2f} to {max(r.speedups):.2f}) | {r.loss_gap:.0e} |"
        for r in results
    ]
    return "\n".join(lines)


def set_layout(stage: nn.Module, layout: Layout) -> None:
    """Switch a stage that was built packed; its attention serves padded rows as well."""
    part: Any
    for part in stage.modules():
        if hasattr(part, "layout"):
            part.layout = layout


@torch.no_grad()
def _losses(stage: Any, layout: Layout, batch: Any) -> dict[str, float]:
    """Token means of the losses, without dropout."""
    set_layout(stage.eval(), layout)
    return {name: float(term.total / term.count.clamp(min=1)) for name, term in stage(batch).items()}


def _step_ms(stage: Any, layout: Layout, batch: Any, device: torch.device) -> float:
    """Milliseconds of a forward and backward."""
    set_layout(stage, layout)
    stage.zero_grad()
    _finish(device)
    before = time.perf_counter()
    torch.stack([term.total for term in stage(batch).values()]).sum().backward()
    _finish(device)
    return (time.perf_counter() - before) * 1000


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(
    recipe: Recipe, text: TextTools, load: Load, dtype: torch.dtype, generator: torch.Generator
) -> SpeechBatch | UnitBatch:
    def lengths(median: float, least: int = 1) -> Tensor:
        spread = torch.randn(load.rows, generator=generator) * load.sigma
        return (median * spread.exp()).round().long().clamp(min=least)

    def tokens(lengths_B: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        mask = torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None]
        return torch.randint(0, classes, mask.shape, generator=generator).masked_fill(~mask, 0), mask

    vocabulary = len(text.tokenizer)
    common: dict[str, Any] = {
        "ids": [str(row) for row in range(load.rows)],
        "step": 0,
        "weight_B": torch.ones(load.rows),
    }
    answer_BR, answer_mask_BR = tokens(lengths(load.response), vocabulary)
    own = recipe.stage == "echo" and recipe.model.echo.pseudo_text == "generated"
    own_BR, own_mask_BR = tokens(lengths(load.response), vocabulary) if own else (None, None)
    if recipe.stage == "t2c":
        words_BM, words_mask_BM = tokens(lengths(load.words), text.words)
        return UnitBatch(
            **common, text_BT=answer_BR, text_mask_BT=answer_mask_BR, words_BM=words_BM, words_mask_BM=words_mask_BM
        )
    speech = recipe.model.speech_encoder
    assert speech is not None
    width, mels = encoder_width(speech.path), mel_bins(speech.path, random_init=True)
    stack = 2 * recipe.model.alignment.stack
    frames_B = (lengths(load.question_s * 100 / stack) * stack).clamp(max=int(speech.max_audio_s * 100))
    longest = int(frames_B.max())
    spoken_B = (frames_B // (4 * stack)).clamp(min=1)
    window = WINDOW // HOP if speech.input == "pad_30s" else 1
    columns = -(-longest // window) * window
    mel_BMT = torch.randn(load.rows, mels, 0 if speech.precomputed else columns, generator=generator)
    features_BTd = torch.randn(load.rows, longest // 2, width, generator=generator)
    prompt = text.prompt
    return SpeechBatch(
        **common,
        mel_BMT=mel_BMT.to(dtype),
        frames_B=frames_B,
        features_BTd=features_BTd.to(dtype) if speech.precomputed else None,
        before_BP=torch.tensor(prompt.before).expand(load.rows, -1),
        after_BQ=torch.tensor(prompt.after).expand(load.rows, -1),
        after_mask_BQ=torch.ones(load.rows, len(prompt.after), dtype=torch.bool),
        response_BR=answer_BR,
        response_mask_BR=answer_mask_BR,
        transcript_BC=tokens(spoken_B, min(vocabulary, _CORPUS_CLASSES))[0],
        transcript_lengths_B=spoken_B,
        own_BR=own_BR,
        own_mask_BR=own_mask_BR,
    )
