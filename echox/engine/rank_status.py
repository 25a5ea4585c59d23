"""Exchanges the votes of all ranks after each step, without waiting: those of a step are counted after the next one.

The votes go over a process group of their own, beside training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from echox.engine.world import World


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one rank has to say after a step.

    Attributes:
        stop: it was asked to stop.
        written: its part of the checkpoint under way lies on disk.
        failed: its part could not be written.
        published: the checkpoint is published (rank 0 alone knows).
        save: number of the checkpoint under way; all ranks begin saves at the same step, so they agree on it.
    """

    stop: bool = False
    written: bool = False
    failed: bool = False
    published: bool = False
    save: int = 0


class RankStatus:
    """One vote a step, all ranks in the same order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cast: tuple[Vote, Tensor, Any] | None = None

    def exchange(self, vote: Vote) -> Vote:
        """Cast this step's vote and return the outcome of the one before; the first outcome is empty.

        In the outcome `stop`, `failed` and `published` hold when any rank says so, `written` when all do.
        """
        outcome = self.collect()
        self._cast = (vote, *self._start(vote))
        return outcome

    def exchange_now(self, vote: Vote) -> Vote:
        """Cast a vote and wait for its own outcome; one that was not counted before is dropped."""
        self.collect()
        self._cast = (vote, *self._start(vote))
        return self.collect()

    def collect(self) -> Vote:
        """Outcome of the vote that was cast last and not counted yet; empty if there is none."""
        if self._cast is None:
            return Vote()
        (vote, sums, work), self._cast = self._cast, None
        if work is not None:
            work.wait()
        stop, written, failed, published = sums.tolist()
        return replace(
            vote, stop=stop > 0, written=written == self._world.size, failed=failed > 0, published=published > 0
        )

    def _start(self, vote: Vote) -> tuple[Tensor, Any]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor([vote.stop, vote.written, vote.failed, vote.published], dtype=torch.int32)
        if self._world.size == 1:
            return sums, None
        return sums, dist.all_reduce(sums, group=self._world.control, async_op=True)
