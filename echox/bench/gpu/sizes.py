"""Names the sizes that are measured: the recipes' own of 3B and 8B, and a toy that a CPU steps through in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echox.bench.gpu.recipes import plain_recipe
from echox.bench.micro_batch import Load

if TYPE_CHECKING:
    from echox.config.schema import Recipe

STAGES = ("s2t", "t2c", "echo")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is built and on what it steps.

    Attributes:
        scale: of the recipes.
        load: a micro-batch: questions of 3 to 25 s, replies of 30 to 200 tokens or so.
        changes: recipe keys that differ, `__` for the dot.
    """

    scale: str
    load: Load
    changes: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, stage: str, **changes: Any) -> Recipe:
        """Of a stage, without its alignment steps."""
        aligned = {"model__ctc__align_steps": 0, "model__echo__denoising__align_steps": 0}
        return plain_recipe(f"{self.scale}/{stage}", **{**aligned, **self._of(stage), **changes})

    def _of(self, stage: str) -> dict[str, Any]:
        absent = {"s2t": "model__t2c__", "t2c": "model__speech_encoder__"}.get(stage, "-")
        return {key: value for key, value in self.changes.items() if not key.startswith(absent)}


def _load(rows: int) -> Load:
    return Load(rows=rows, question_s=10.0, response=90, least_response=30, words=300)


_TOY = {
    "model__llm__path": "echox/toy-llama",
    "model__speech_encoder__path": "echox/toy-whisper",
    "model__speech_encoder__max_audio_s": 4.0,
    "model__t2c__layers": 2,
    "model__t2c__width": 32,
    "model__t2c__heads": 2,
    "model__t2c__ffn": 64,
    "model__echo__segmentation__min_tokens": 4,
    "model__echo__segmentation__max_wait": 6,
    "model__echo__segmentation__look_ahead": 1,
}
SIZES: dict[str, Size] = {
    "3b": Size(scale="3b", load=_load(16)),
    "8b": Size(scale="8b", load=_load(8)),
    "toy": Size(scale="3b", load=Load(rows=3, question_s=0.6, response=12, least_response=8, words=12), changes=_TOY),
}
