"""Says how the answers of a benchmark are decoded: greedily, or sampled as the released code does, with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from echox.speak.pipeline import STREAMED_TOKENS
from echox.speak.sampling import SeededSampling
from echox.stream.sampling.keyed_rng import uniform

if TYPE_CHECKING:
    from echox.models.s2t import Choose

TEMPERATURE, TOP_P = 0.2, 0.9
"""Of the released code, `inference/echox_stream.py`; it writes up to 512 tokens."""
FIRST_SEED = 17


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to answer all questions of a benchmark.

    Attributes:
        name: `greedy` or `release`.
        seed: of the random numbers; 0 where none are drawn.
        temperature, top_p: see `Sampling`.
        max_new: most text tokens of an answer.
    """

    name: str = "greedy"
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    max_new: int = STREAMED_TOKENS

    @property
    def stem(self) -> str:
        """How the files of its answers begin."""
        return f"{self.name}-{self.seed}"

    def of(self, numbers: Sequence[int]) -> SeededSampling:
        """How the tokens of some questions are picked: of each by random numbers of its own."""
        own = tuple(numbers)
        return _OfQuestions(temperature=self.temperature, top_p=self.top_p, seed=self.seed, numbers=own)

    def identity(self) -> dict[str, Any]:
        """What an answer depends on."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {"max_new": self.max_new, **(sampled if self.temperature else {"temperature": 0.0})}


def decodings(sampling: str | None, repeats: int, max_new: int) -> list[Decoding]:
    """Greedy, and with `release` so many sampled runs."""
    greedy = Decoding(max_new=max_new)
    if sampling is None:
        return [greedy]
    seeds = range(FIRST_SEED, FIRST_SEED + repeats)
    sampled = replace(greedy, name=sampling, temperature=TEMPERATURE, top_p=TOP_P)
    return [greedy, *(replace(sampled, seed=seed) for seed in seeds)]


@dataclass(frozen=True, kw_only=True)
class _OfQuestions(SeededSampling):
    """Random numbers of their own for each question: with the same ones, the answers of a run would vary together."""

    numbers: tuple[int, ...] = field(default=())

    def choose(self, most: int) -> Choose:
        rows = [uniform(most, "benchmark", self.seed, number) for number in self.numbers]
        return self.choosing(torch.from_numpy(np.stack(rows)))
