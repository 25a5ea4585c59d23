"""Makes synthetic micro-batches of random content and log-normal lengths, so that no benchmark needs a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from echox.audio.features import HOP, WINDOW
from echox.release.pretrained import encoder_width, mel_bins
from echox.stream.batch import SpeechBatch, UnitBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echox.config.schema import Recipe

CORPUS_CLASSES = 1000
"""CTC classes of `vocabulary: corpus`, and the tokens that transcripts are made of."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A synthetic micro-batch; lengths are log-normal around the medians given.

    Attributes:
        rows: samples.
        question_s: seconds of a spoken question.
        response: tokens of a text answer, or of the text that T2C reads.
        least_response: no answer is shorter.
        words: unit-language words of a T2C sample.
        words_per_token: unit-language words that the teacher of Stage III says a text token, see `imposed`.
        sigma: standard deviation of the logarithm of a length.
    """

    rows: int = 12
    question_s: float = 1.4
    response: int = 20
    least_response: int = 1
    words: int = 70
    words_per_token: float = 3.0
    sigma: float = 0.4


class Vocabulary(NamedTuple):
    """What a batch is made of: tokens of the LLM, words of the unit language, and the prompt around the audio."""

    tokens: int
    words: int
    before: Sequence[int]
    after: Sequence[int]


def micro_batch(
    recipe: Recipe, vocabulary: Vocabulary, load: Load, dtype: torch.dtype, seed: int = 0
) -> SpeechBatch | UnitBatch:
    """A micro-batch for the recipe's stage, on the CPU.

    Args:
        recipe: says whether the encoder's output was computed before, and how audio is padded.
        vocabulary: of the tokens and words.
        load: how much of it.
        dtype: of log-mel and features.
        seed: of lengths and content.
    """
    generator = torch.Generator().manual_seed(seed)

    def lengths(median: float, least: int = 1) -> Tensor:
        spread = torch.randn(load.rows, generator=generator) * load.sigma
        return (median * spread.exp()).round().long().clamp(min=least)

    def tokens(lengths_B: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        mask = torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None]
        return torch.randint(0, classes, mask.shape, generator=generator).masked_fill(~mask, 0), mask

    common: dict[str, Any] = {
        "ids": [str(row) for row in range(load.rows)],
        "step": 0,
        "weight_B": torch.ones(load.rows),
    }
    answer_BR, answer_mask_BR = tokens(lengths(load.response, load.least_response), vocabulary.tokens)
    own = recipe.stage == "echo" and recipe.model.echo.pseudo_text == "generated"
    own_BR, own_mask_BR = (
        tokens(lengths(load.response, load.least_response), vocabulary.tokens) if own else (None, None)
    )
    if recipe.stage == "t2c":
        words_BM, words_mask_BM = tokens(lengths(load.words), vocabulary.words)
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
    window = 1 if speech.input == "trim" else WINDOW // HOP
    columns = -(-longest // window) * window
    mel_BMT = torch.randn(load.rows, mels, 0 if speech.precomputed else columns, generator=generator)
    features_BTd = torch.randn(load.rows, longest // 2, width, generator=generator) if speech.precomputed else None
    return SpeechBatch(
        **common,
        mel_BMT=mel_BMT.to(dtype),
        frames_B=frames_B,
        features_BTd=None if features_BTd is None else features_BTd.to(dtype),
        before_BP=torch.tensor(vocabulary.before).expand(load.rows, -1),
        after_BQ=torch.tensor(vocabulary.after).expand(load.rows, -1),
        after_mask_BQ=torch.ones(load.rows, len(vocabulary.after), dtype=torch.bool),
        response_BR=answer_BR,
        response_mask_BR=answer_mask_BR,
        transcript_BC=tokens(spoken_B, min(vocabulary.tokens, CORPUS_CLASSES))[0],
        transcript_lengths_B=spoken_B,
        own_BR=own_BR,
        own_mask_BR=own_mask_BR,
    )
