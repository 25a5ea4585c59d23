"""Turns assumed lengths of a sample into the counts that FLOP, memory and time are computed from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echox.models.flops import (
    Costs,
    denoising_costs,
    llm_costs,
    speech_costs,
    t2c_costs,
)

if TYPE_CHECKING:
    from echox.bench.plan.shapes import StageShape
    from echox.config.schema import Recipe

VECTORS_PER_S = 7.0
"""Speech vectors that are left of a second of speech: one a text token and the blanks between them."""
SEGMENT_TOKENS = 25
"""Text tokens of a segment, where the trigger may cut after 20."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Lengths of one sample; all samples are taken to be alike.

    Attributes:
        question_s: seconds of the question.
        reply: tokens of the response, or of the text that Stage II reads.
        words_per_token: unit-language words a text token of the reply.
    """

    question_s: float = 10.0
    reply: int = 100
    words_per_token: float = 3.0


@dataclass(frozen=True)
class Rows:
    """Lengths that a sample takes in each network, in positions.

    Attributes:
        frames: of the speech encoder (50 a second).
        aligned: of the alignment adapter.
        kept: speech vectors.
        llm: prompt, speech vectors and reply.
        reply: tokens that the head predicts.
        passes: times that the LLM runs with a gradient.
        segments: rows of the decoders; 0 in Stage I.
        segment: positions of such a row: template, text and words.
        words: of a segment, its end among them.
    """

    frames: float
    aligned: float
    kept: float
    llm: float
    reply: float
    passes: int
    segments: float
    segment: float
    words: float


def rows_of(recipe: Recipe, sample: Sample) -> Rows:
    """Lengths of the recipe's stage."""
    model = recipe.model
    prompt = model.llm.prompt
    template = template_tokens((prompt.before or "") + (prompt.after or "")) or 20
    frames = 50 * sample.question_s
    kept = VECTORS_PER_S * sample.question_s
    segments, text = 0.0, 0.0
    if recipe.stage == "t2c":
        segments, text = 1.0, float(sample.reply)
    elif recipe.stage == "echo":
        whole = model.echo.segmentation.mode == "none"
        segments = 1.0 if whole else max(1.0, sample.reply / SEGMENT_TOKENS)
        text = sample.reply / segments
    words = text * sample.words_per_token + 1
    around = 0 if model.t2c is None else template_tokens(model.t2c.prefix + model.t2c.unit_header)
    again = recipe.stage == "echo" and model.echo.pseudo_text in ("generated", "free_run")
    return Rows(
        frames=frames,
        aligned=frames / model.alignment.stack,
        kept=kept,
        llm=template + kept + sample.reply,
        reply=float(sample.reply),
        passes=2 if again else 1,
        segments=segments,
        segment=around + text + words - 1,
        words=words,
    )


def template_tokens(text: str) -> int:
    """Tokens of a template: one for each special token, and one for four characters of the rest."""
    plain = re.sub(r"<\|[^|]*\|>", "", text)
    return len(re.findall(r"<\|[^|]*\|>", text)) + -(-len(plain) // 4)


def stage_costs(recipe: Recipe, shape: StageShape) -> Costs:
    """FLOP a count, part by part, as the stage itself has them."""
    echo = recipe.model.echo
    if recipe.stage == "t2c":
        assert shape.t2c is not None
        return t2c_costs(shape.t2c, "t2c", trains=True)
    assert shape.speech is not None
    adapters = recipe.stage == "s2t" or echo.train_speech_adapters
    costs = {
        **speech_costs(shape.speech, adapters_train=adapters, ctc_trains=recipe.stage == "s2t" or echo.ctc_weight > 0),
        **llm_costs(shape.llm_size, inputs_live=adapters),
    }
    if recipe.stage == "echo":
        assert shape.t2c is not None
        costs |= denoising_costs(shape.llm.width, shape.denoising)
        costs |= t2c_costs(shape.t2c, "echo", trains=True)
        if echo.labels != "annotated":
            costs |= t2c_costs(shape.t2c, "teacher", trains=False)
    return costs


def counts(recipe: Recipe, rows: Rows, samples: int) -> dict[str, float]:
    """Positions and pairs of a micro-batch, under the names of `echox/models/flops.py`."""
    found: dict[str, float] = {}

    def add(name: str, number: float, length: float, keys: float) -> None:
        found[name] = found.get(name, 0.0) + samples * number * length
        found[f"{name}_pairs"] = found.get(f"{name}_pairs", 0.0) + samples * number * length * keys

    if recipe.stage != "t2c":
        windows = max(1.0, rows.frames / 1500)
        add("frames", windows, rows.frames / windows, rows.frames / windows)
        for name in ("aligned", "aligned_live", "aligned_keys", "aligned_keys_live"):
            add(name, 1, rows.aligned, rows.aligned)
        for name in ("kept", "kept_live", "kept_keys", "kept_keys_live"):
            add(name, 1, rows.kept, rows.aligned)
        for name in ("llm", "llm_live"):
            add(name, rows.passes, rows.llm, (rows.llm + 1) / 2)
        for name in ("head", "head_live", "adapted", "adapted_live", "adapted_through"):
            add(name, 1, rows.reply, 0)
    if rows.segments:
        for name in ("t2c",) if recipe.stage == "t2c" else ("echo", "teacher"):
            for each in (name, f"{name}_live"):
                add(each, rows.segments, rows.segment, (rows.segment + 1) / 2)
            for each in (f"{name}_head", f"{name}_head_live"):
                add(each, rows.segments, rows.words, 0)
    return found
