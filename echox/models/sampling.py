"""Picks the next token: the most probable one, or a random one among the more probable ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from echox.models.s2t import Choose


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked.

    Attributes:
        temperature: logits are divided by it, and sampled; 0 takes the most probable token.
        top_p: sample among the most probable tokens that together have this probability.
        top_k: sample among so many most probable tokens; 0: any number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature is {self.temperature}, not a number from 0 on")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, not above 0 and up to 1")
        if self.top_k < 0:
            wrong.append(f"top_k is {self.top_k}, below 0")
        if wrong:
            raise ValueError("; ".join(wrong))

    def pick(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """The next token `[B]` of each row.

        A random number becomes a token by the inverse of the cumulative distribution over the tokens, the most probable
        first, cut off behind `top_k` and `top_p` (Holtzman et al., arXiv 1904.09751).

        Args:
            logits_BV: of the next token.
            uniform_B: a random number in [0, 1) a row; not read at temperature 0.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        scaled_BV = logits_BV.double() / self.temperature
        probable_BV, tokens_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
        reached_BV = probable_BV.cumsum(-1)
        kept_BV = reached_BV - probable_BV < self.top_p
        if self.top_k:
            kept_BV[:, self.top_k :] = False
        mass_B1 = (probable_BV * kept_BV).sum(-1, keepdim=True)
        wanted_B1 = uniform_B[:, None].to(mass_B1) * mass_B1
        rank_B1 = (reached_BV <= wanted_B1).sum(-1, keepdim=True)
        chosen_B1: Tensor = tokens_BV.gather(-1, rank_B1.minimum(kept_BV.sum(-1, keepdim=True) - 1))
        return chosen_B1[:, 0]

    def choosing(self, uniform_BR: Tensor) -> Choose:
        """Picks the tokens of answers by their places.

        Args:
            uniform_BR: a random number a token for each row; one row of them is for all rows alike.
        """

        def choose(logits_BV: Tensor, place: int) -> Tensor:
            return self.pick(logits_BV, uniform_BR[:, place].expand(len(logits_BV)))

        return choose
