"""Imposes lengths on networks of random weights, which else decode to their caps and keep every frame of speech."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from echox.bench.plan.load import VECTORS_PER_S
from echox.models.greedy import DecodedUnits, Draft
from echox.models.ragged import JoinedRows
from echox.stages.echo import EchoStage

if TYPE_CHECKING:
    from echox.models.ragged import Rows

SPREAD = (1.0, 0.8, 1.25, 0.9, 1.1, 0.7, 1.3)
"""Factors of the words a token, segment by segment: rows of a batch end one after the other, as spoken ones do."""
FRAMES_PER_S = 50


@contextmanager
def imposed(stage: Any, words_per_token: float) -> Iterator[None]:
    """Let a stage's speech and teacher have the lengths of a trained one while this holds.

    Speech shrinks to `VECTORS_PER_S` vectors a second. The teacher of Stage III computes every word that it says; only
    how many a segment has is given: so many a text token, times `SPREAD`, after which a row has ended.
    """
    undo = []
    if hasattr(stage, "s2t"):
        front_end = stage.s2t.front_end
        vectors = VECTORS_PER_S * front_end.alignment.stack / FRAMES_PER_S
        hook = front_end.shrink.register_forward_pre_hook(
            lambda module, given: (given[0], given[1], runs(given[1], vectors))
        )
        undo.append(hook.remove)
    if isinstance(stage, EchoStage):
        undo.append(_impose_words(stage, words_per_token))
    try:
        yield
    finally:
        for each in undo:
            each()


def runs(frames: Rows, vectors: float) -> Tensor:
    """CTC labels in the layout of the frames, a new one every `1 / vectors` frames, none of them the blank."""
    return 1 + (frames.positions * vectors).long()


def words_of(tokens_N: Tensor, words_per_token: float) -> Tensor:
    """Words that are imposed on segments of so many text tokens."""
    spread_N = torch.tensor(SPREAD, device=tokens_N.device).repeat(-(-len(tokens_N) // len(SPREAD)))[: len(tokens_N)]
    return (tokens_N * spread_N * words_per_token).round().long().clamp(min=1)


def _impose_words(stage: EchoStage, words_per_token: float) -> Any:
    decoder: Any = stage.teacher.decoder
    end_h = decoder.head.weight[decoder.text_classes + decoder.end]
    before_h = end_h.detach().clone()
    with torch.no_grad():
        end_h.zero_()  # of some random logits, one is always above 0: the end is not said

    def say(
        text_BLh: Tensor,
        mask_BL: Tensor,
        limit_N: Tensor,
        starts_BS: Tensor | None = None,
        draft: Draft | None = None,
    ) -> DecodedUnits:
        said: DecodedUnits = decoder.greedy(JoinedRows(text_BLh, mask_BL, []), limit_N, starts_BS, draft=draft)
        return said._replace(ended_N=torch.ones_like(said.ended_N))

    names: Any = stage
    names.most_words = lambda tokens_N: words_of(tokens_N, words_per_token)
    names.teacher.forward = say

    def undo() -> None:
        del names.most_words, names.teacher.forward
        with torch.no_grad():
            end_h.copy_(before_h)

    return undo
