"""Learns from texts and their unit-language words how many words a text token needs: the teacher's limit follows it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPARE_WORDS = 32
"""Words that any segment may have beside those for its tokens: a number of one token can take a second to say."""
UNKNOWN = 12
"""Words a text token, where nothing was learned."""
OUTLIERS = 1000
"""One text in so many may need more: a recording with a text that is not its own must not set the limit of all."""
MARGIN = 1.25
"""What is allowed over what the texts need: the texts that Stage III speaks are others."""


def words_per_token(tokens_N: NDArray[Any], words_N: NDArray[Any]) -> float:
    """Words a token with which texts of T tokens, but for outliers, fit into `T * words_per_token + SPARE_WORDS`.

    It is never below the mean over all tokens, so that it holds for texts longer than these, and comes with a margin.

    Args:
        tokens_N: text tokens of each text, at least one.
        words_N: unit-language words of each.

    Returns:
        Rounded up to hundredths.

    Raises:
        ValueError: there is no text.
    """
    if not len(tokens_N):
        raise ValueError("words a token cannot be learned from no texts")
    needed_N = np.sort((words_N - SPARE_WORDS) / tokens_N)
    fitting = len(needed_N) - len(needed_N) // OUTLIERS
    most = max(float(needed_N[fitting - 1]), float(words_N.sum() / tokens_N.sum()))
    return math.ceil(100 * MARGIN * most) / 100
