"""Draws sentences again and again, for what another draw of them would have given: the bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from echox.evaluate.text import word_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_DRAWS, _SEED = 2000, 17


def drawn_rates(texts: Sequence[str], heard: Sequence[str], language: str) -> Floats:
    """Error rates `[R]` of so many draws of the sentences with replacement, the same sentences at every call.

    Args:
        texts: of the sentences.
        heard: their transcripts.
        language: by whose rules they are compared.
    """
    counted = [word_errors(text, said, language) for text, said in zip(texts, heard, strict=True)]
    errors_N, words_N = np.array(counted, dtype=np.float64).T
    drawn_RN = np.random.default_rng(_SEED).integers(0, len(texts), (_DRAWS, len(texts)))
    return np.asarray(errors_N[drawn_RN].sum(1) / np.maximum(words_N[drawn_RN].sum(1), 1))


def interval_95(drawn_R: Floats) -> list[float]:
    """The percentile interval of a statistic by its draws, [low, high]."""
    return [float(end) for end in np.quantile(drawn_R, (0.025, 0.975))]
