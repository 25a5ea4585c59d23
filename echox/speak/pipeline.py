"""Runs a trained speech-to-speech model: question audio to text and units, greedily and in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from echox.audio.io import SAMPLE_RATE
from echox.builders.setup import TextTools, build_speech_collate, build_stage, load_tensors
from echox.builders.unit_sets import check_language, with_own_language
from echox.config.schema import InitConfig, Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import MANIFEST
from echox.errors import CheckpointError
from echox.models.echo import segment_rows
from echox.models.s2t import Generated
from echox.models.t2c import text_part
from echox.stages.echo import EchoStage
from echox.stages.s2t import S2TStage
from echox.stream.batch import SpeechBatch
from echox.units.identity import UnitPart

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SpokenAnswer:
    """What the model says to one question.

    Attributes:
        text: its own text.
        units: speech units that the Echo decoder made of its hidden states, uint16.
    """

    text: str
    units: NDArray[np.uint16]


class SpeechToSpeech:
    """An S2T or Echo run, loaded for greedy inference.

    Args:
        recipe: of the run.
        stage: its module with trained weights, in eval mode.
        text: tokenizer, templates and unit language.
        max_new: most text tokens of an answer.
    """

    def __init__(self, recipe: Recipe, stage: S2TStage | EchoStage, text: TextTools, max_new: int = 64) -> None:
        self.recipe = recipe
        self.stage = stage.eval()
        self.max_new = max_new
        self._text = text
        self._collate = build_speech_collate(recipe, text)
        self._device = next(stage.parameters()).device

    @classmethod
    def load(cls, run_or_checkpoint: Path, device: str | None = None) -> SpeechToSpeech:
        """Load the newest good checkpoint of a run folder, or the checkpoint given.

        The unit language is the one that the run keeps; only for older runs, the one that the recipe names.

        Raises:
            CheckpointError: no checkpoint, one of a stage that hears no speech, or another unit language than it had.
        """
        from safetensors.torch import load_file

        weights = find_weights(run_or_checkpoint)
        recipe = Recipe.model_validate(json.loads((weights.parent / MANIFEST).read_text())["recipe"])
        if recipe.stage == "t2c":
            raise CheckpointError("a t2c run hears no speech", where=str(weights), fix="name an s2t or echo run")
        recipe = with_own_language(recipe, weights.parent)
        text = TextTools.load(recipe)
        if recipe.stage == "echo" and recipe.model.t2c is not None and text.language is not None:
            check_language(text.language, recipe.model.t2c.unit_language, weights.parent)
        if recipe.stage == "s2t":
            # An S2T run is complete in itself: its own weights stand for those of an earlier stage.
            stage = build_stage(recipe.model_copy(update={"init": InitConfig(s2t=str(weights.parent))}), text)
        else:
            stage = build_stage(recipe, text)
            load_tensors(stage, load_file(weights))
        assert isinstance(stage, S2TStage | EchoStage)
        return cls(recipe, stage.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), text)

    def _batch(self, clips: Sequence[NDArray[np.float32]], task: str) -> SpeechBatch:
        count = len(clips)
        batch = self._collate.from_audio(
            clips, [task] * count, [""] * count, [""] * count, ids=[""] * count, weights=[1.0] * count
        )
        return batch.to(self._device)

    @property
    def units(self) -> UnitPart:
        """Which units it speaks in."""
        language = self._text.language
        return UnitPart(f"run {self.recipe.name}", None if language is None else language.unit_set)

    @property
    def max_audio_s(self) -> float:
        """What is heard of a clip, seconds; the rest is cut off."""
        return self._collate.max_samples / SAMPLE_RATE

    def generate(self, clips: Sequence[NDArray[np.float32]], task: str = "sqa") -> Generated:
        """Greedy text and its hidden states for 16 kHz mono clips."""
        return self.stage.s2t.generate(self._batch(clips, task), self._text.prompt.end, self.max_new)

    def write(self, clips: Sequence[NDArray[np.float32]], task: str = "sqa") -> list[str]:
        """Text answers (`sqa`) or transcripts (`asr`)."""
        return self._decode(self.generate(clips, task))

    @torch.no_grad()
    def answer(self, clips: Sequence[NDArray[np.float32]]) -> list[SpokenAnswer]:
        """Text and units: the Echo decoder reads the hidden states of the text, segment by segment.

        Raises:
            CheckpointError: the run is an S2T run, which does not speak.
        """
        stage, language = self.stage, self._text.language
        if not isinstance(stage, EchoStage) or language is None:
            raise CheckpointError("an s2t run does not speak", fix="name a run of the echo stage")
        own = self.generate(clips)
        rows = segment_rows(stage.segments(own.hidden_BRh, own.mask_BR), own.mask_BR)
        prefix, header = stage.s2t.embed(stage.prefix_P), stage.s2t.embed(stage.header_Q)
        adapted = rows.scatter(stage.denoising(own.hidden_BRh))
        text = text_part(prefix, adapted, rows.mask_NT, header).left_padded()
        decoded = stage.echo.greedy(text, stage.most_words(rows.mask_NT.sum(1)))
        # Where no clip has an answer, one row without a token stands for them all; it says nothing.
        said_NM = decoded.mask_NM & rows.mask_NT.any(1, keepdim=True)
        pieces: list[list[NDArray[np.uint16]]] = [[] for _ in clips]
        for owner, words, mask in zip(
            rows.owner_N.tolist(), decoded.words_NM.cpu().numpy(), said_NM.cpu().numpy(), strict=True
        ):
            pieces[owner].append(np.asarray(language.decode(words[mask]), dtype=np.uint16))
        units = [np.concatenate(piece) if piece else np.zeros(0, np.uint16) for piece in pieces]
        return [SpokenAnswer(text, row) for text, row in zip(self._decode(own), units, strict=True)]

    def _decode(self, own: Generated) -> list[str]:
        rows = [tokens[mask].tolist() for tokens, mask in zip(own.tokens_BR, own.mask_BR, strict=True)]
        return [self._text.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
