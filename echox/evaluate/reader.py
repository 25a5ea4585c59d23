"""Lets a T2C run read texts aloud: the newest checkpoint of Stage II by itself, before there is any Echo run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from echox.builders.setup import TextTools, build_stage, load_tensors
from echox.builders.unit_sets import with_own_language
from echox.builders.word_limit import recorded
from echox.config.schema import Recipe
from echox.device import best_device
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.recorded import recipe_of
from echox.errors import CheckpointError
from echox.models.ragged import lengths_to_mask
from echox.release.exported import read_tensors
from echox.stages.t2c import T2CStage
from echox.units.identity import UnitPart
from echox.units.word_limit import SPARE_WORDS, UNKNOWN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Units = NDArray[np.uint16]


class TextReader:
    """A T2C run, loaded for inference.

    Args:
        recipe: of the run.
        stage: its module with trained weights.
        text: tokenizer, templates and unit language.
        words_per_token: unit-language words that a text token may have, beside a few for any text.
    """

    def __init__(self, recipe: Recipe, stage: T2CStage, text: TextTools, words_per_token: float) -> None:
        self.recipe = recipe
        self._stage, self._text, self._words_per_token = stage.eval(), text, words_per_token
        self._device = next(stage.parameters()).device

    @classmethod
    def load(cls, run_or_checkpoint: Path, device: str | None = None) -> TextReader:
        """Load the newest good checkpoint of a run folder, or the checkpoint given.

        Raises:
            CheckpointError: there is none, or one of another stage.
        """
        weights = find_weights(run_or_checkpoint)
        recipe = recipe_of(weights.parent)
        if recipe.stage != "t2c":
            fix = "name a t2c run, or leave out --sentences"
            raise CheckpointError(f"a run of the stage {recipe.stage} reads no texts", where=str(weights), fix=fix)
        recipe = with_own_language(recipe, weights.parent)
        text = TextTools.load(recipe)
        stage = build_stage(recipe, text)
        assert isinstance(stage, T2CStage)
        load_tensors(stage, read_tensors(weights))
        return cls(recipe, stage.to(device or best_device()), text, recorded(weights.parent) or UNKNOWN)

    @property
    def units(self) -> UnitPart:
        """Which units it speaks in."""
        language = self._text.language
        return UnitPart(f"run {self.recipe.name}", None if language is None else language.unit_set)

    @torch.no_grad()
    def say(self, texts: Sequence[str]) -> list[tuple[Units, bool]]:
        """Greedy units of each text, uint16, and whether they came to an end within the words that it may have.

        A text without a token has no units.
        """
        language = self._text.language
        assert language is not None
        ids = [self._text.tokenize(text) for text in texts]
        # A text without a token takes a column that its mask leaves out.
        tokens_BT = pad_sequence([torch.tensor(row or [0]) for row in ids], batch_first=True).to(self._device)
        lengths_B = torch.tensor([len(row) for row in ids], device=self._device)
        part = self._stage.text(tokens_BT, lengths_to_mask(lengths_B, tokens_BT.shape[1]))
        limit_B = (lengths_B * self._words_per_token).ceil().long() + SPARE_WORDS
        found = self._stage.t2c.greedy(part.left_padded(), limit_B, part.starts_NS)
        told_BM = found.mask_NM & (lengths_B > 0)[:, None]
        words = [row[mask].cpu().numpy() for row, mask in zip(found.words_NM, told_BM, strict=True)]
        units = [np.asarray(language.decode(row), dtype=np.uint16) for row in words]
        return list(zip(units, (found.ended_N | (lengths_B == 0)).tolist(), strict=True))
