"""Decodes the model's answers to a batch of spoken questions, and says which of them are of no use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from echox.config.model_schema import RespondConfig
from echox.models.greedy import repeats
from echox.models.s2t import Choose, most_probable
from echox.models.sampling import Sampling
from echox.responses.table import Answer
from echox.stream.sampling.keyed_rng import uniform

if TYPE_CHECKING:
    from echox.models.s2t import S2TModel
    from echox.stream.batch import SpeechBatch

EMPTY, LOOPING, CUT, DAMAGED, NO_USE = "empty", "looping", "cut", "damaged", "of no use"
"""Why an answer is not used: it says nothing, repeats itself, has no end, its question cannot be read, or is none."""
LONGEST_LOOP, LOOPS = 32, 6
"""An answer loops that has up to so many tokens so many times in a row; a sentence has about 20."""


class KeyedSampling:
    """Samples tokens with random numbers that depend on seed and sample alone, whatever the batch and the process.

    Args:
        config: temperature above 0, `top_p` and seed.
        ids: of the samples, in row order.
    """

    def __init__(self, config: RespondConfig, ids: Sequence[str]) -> None:
        rows = [uniform(config.max_tokens, "respond", config.seed, name) for name in ids]
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
        self._choose = sampling.choosing(torch.from_numpy(np.stack(rows)))

    def __call__(self, logits_BV: Tensor, place: int) -> Tensor:
        """The token `[B]` at `place` of each answer."""
        return self._choose(logits_BV, place)


class Decoder:
    """Answers batches of questions.

    Args:
        config: how to decode.
        end_token: id that ends an answer.
        to_text: token ids to text.
    """

    def __init__(self, config: RespondConfig, end_token: int, to_text: Callable[[list[int]], str]) -> None:
        self._config = config
        self._end_token = end_token
        self._to_text = to_text

    def generate(
        self, s2t: S2TModel, batch: SpeechBatch, early_stop: bool | Callable[[Tensor], bool] = True
    ) -> list[list[int]]:
        """Token ids of each row before its end; `max_tokens` of them where there is none."""
        greedy = self._config.temperature == 0 or not batch.ids
        choose: Choose = most_probable if greedy else KeyedSampling(self._config, batch.ids)
        own = s2t.generate(batch, self._end_token, self._config.max_tokens, early_stop=early_stop, choose=choose)
        tokens_BR, lengths_B = own.tokens_BR.cpu(), own.mask_BR.sum(1).tolist()
        return [row[:length].tolist() for row, length in zip(tokens_BR, lengths_B, strict=True)]

    def judged(self, batch: SpeechBatch, rows: Sequence[list[int]]) -> list[Answer]:
        """Generated rows as answers to the samples of a batch."""
        found = []
        for (_, number), name, tokens in zip(batch.addresses, batch.ids, rows, strict=False):
            text = self._to_text(tokens)
            reason = self.reason(tokens, text)
            found.append(Answer(number=number, id=name, tokens=tokens, text=text, rejected=reason))
        return found

    def reason(self, tokens: list[int], text: str) -> str:
        """Why an answer is not used; empty where it is."""
        if looping(tokens):
            return LOOPING
        if len(tokens) >= self._config.max_tokens:
            return CUT
        return "" if text.strip() else EMPTY


def looping(tokens: Sequence[int]) -> bool:
    """Whether some run of up to `LONGEST_LOOP` tokens stands `LOOPS` times in a row."""
    row_1T = torch.tensor([list(tokens)], dtype=torch.long)
    mask_1T = torch.ones_like(row_1T, dtype=torch.bool)
    return bool(repeats(row_1T, mask_1T, longest_period=LONGEST_LOOP, times=LOOPS).any())
