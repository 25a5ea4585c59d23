"""Draws the random numbers of a sampled answer from its seed alone, whatever else is answered at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from echox.models.sampling import Sampling
from echox.stream.sampling.keyed_rng import uniform

if TYPE_CHECKING:
    from echox.models.s2t import Choose


@dataclass(frozen=True, kw_only=True)
class SeededSampling(Sampling):
    """How an answer's tokens are picked.

    Attributes:
        seed: of its random numbers.
    """

    seed: int = 17

    def choose(self, most: int) -> Choose:
        """Picks each of up to `most` tokens, of any number of rows alike."""
        return self.choosing(torch.from_numpy(uniform(most, "speak", self.seed))[None])


GREEDY = SeededSampling()
