"""Runs one optimizer step, and one validation pass: the exact gradient of the mean over all tokens of the global batch.

DeepSpeed averages gradients over ranks (it divides by the world size before it adds) and, when told not to scale by
accumulation steps, adds those of the micro-steps. So a loss of `weight * total * world / count` on each rank and
micro-step gives the gradient of `weight * sum(totals) / count`, where `count` is the tokens of the whole window.

Counts and weights must therefore be known before the first backward. Those that a batch tells by itself are summed over
ranks at once. Those that depend on what a forward finds (how many units the teacher decodes, lambda of the denoising
loss) are exact after the only forward where a step has one micro-batch; with several, each micro-batch first gets a
forward without gradient, whose sums meet in one all-reduce. That costs a forward of the LLM for each micro-batch and no
memory: the stage keeps what it found (the teacher's units) on the batch, so that nothing is decoded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.interfaces import BatchLike, LossTermLike
    from echox.engine.loss_guard import LossGuard
    from echox.engine.world import World


@dataclass
class StepSums:
    """What one optimizer step adds up; tensors stay on the device until someone reads them.

    Attributes:
        names: the losses, in the order of the rows of `sums_K2`.
        sums_K2: global sum of token losses and number of tokens of each loss.
        total: the weighted loss.
        weights: the weights of the last micro-step.
        stats: host numbers of this rank's batches.
        samples: samples of this rank.
        account_A: global sum of the batches' accounts, where they have any.
        work: what the stage noted of each forward, from which it computes its FLOP.
    """

    names: tuple[str, ...] = ()
    sums_K2: Tensor | None = None
    total: Tensor | None = None
    weights: Mapping[str, Tensor | float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    account_A: Tensor | None = None
    work: list[Any] = field(default_factory=list)

    def note_work(self, stage: Any) -> None:
        """Keep what the stage noted of its last forward, if it does; no kernel and no host sync."""
        if hasattr(stage, "work"):
            self.work.append(stage.work)

    def means(self) -> dict[str, float]:
        """Token means of the losses that had tokens, and `total`. A host sync."""
        if self.sums_K2 is None:
            return {}
        means = {
            name: total / count for name, (total, count) in zip(self.names, self.sums_K2.tolist(), strict=True) if count
        }
        return means if self.total is None else {"total": float(self.total), **means}

    def tokens(self) -> float:
        """Tokens behind the losses, all ranks. A host sync."""
        return 0.0 if self.sums_K2 is None else float(self.sums_K2[:, 1].sum())


def train_step(engine: Engine, batches: Sequence[BatchLike], step: int, world: World, health: LossGuard) -> StepSums:
    """Forward, backward and update over the micro-batches of optimizer step `step`; no host sync of ours.

    A step whose loss `health` finds bad changes no weight; see `Engine.skipped_last_step`.
    """
    sums = StepSums()
    on_device = [batch.to(world.device) for batch in batches]
    accounts = [_account(batch, world) for batch in batches]
    survey = _survey(engine, on_device, step, world, sums)
    known = {} if survey is not None else _known_counts(engine.stage, batches, world)
    engine.clear_gradients()
    for batch, account in zip(on_device, accounts, strict=True):
        terms = engine.ds(batch)
        sums.note_work(engine.stage)
        names, micro_K2, account_A = _global_sums(terms, account, world)
        window = survey
        if window is None:
            _check_counted(known, names, batches)
            counts = {**dict(zip(names, micro_K2[:, 1], strict=True)), **known}
            window = _Window(counts, engine.stage.loss_weights(_means(names, micro_K2), step))
        loss = torch.zeros((), device=world.device)
        value = torch.zeros((), device=world.device, dtype=torch.float64)
        for row, name in enumerate(names):
            count = window.counts[name].clamp(min=1)
            loss = loss + window.weights[name] * terms[name].total * (world.size / count).to(loss.dtype)
            weight = window.weights[name]  # a number stays one: as a tensor it would be copied to the device
            value = value + (weight.to(value) if isinstance(weight, Tensor) else weight) * micro_K2[row, 0] / count
        sums.names, sums.weights = names, window.weights
        sums.sums_K2 = micro_K2 if sums.sums_K2 is None else sums.sums_K2 + micro_K2
        sums.total = value if sums.total is None else sums.total + value
        if batch is on_device[-1]:  # the loss of the whole step is known
            loss = loss * health.nan_if_bad(sums.total).to(loss.dtype)
        engine.ds.backward(loss, scale_wrt_gas=False)
        engine.ds.step()
        sums.account_A = account_A if sums.account_A is None else sums.account_A + account_A
    for batch in batches:
        sums.samples += len(batch.ids)
        for key, number in batch_stats(batch).items():
            sums.stats[key] = sums.stats.get(key, 0.0) + number
    return sums


def validate(engine: Engine, batches: Iterable[BatchLike], world: World, keep_going: Callable[[], bool]) -> StepSums:
    """Sums of the losses over a validation set, every rank with the same number of batches.

    `keep_going` is asked before each batch, and gives the same answer on all ranks; after a no, the rest is left out.
    """
    sums = StepSums()
    with engine.evaluating():
        for batch in batches:
            if not keep_going():
                break
            sums.names, local_K2 = _local_sums(engine.ds(batch.to(world.device)))
            sums.sums_K2 = local_K2 if sums.sums_K2 is None else sums.sums_K2 + local_K2
    if sums.sums_K2 is not None:
        world.all_reduce(sums.sums_K2)
    return sums


def batch_stats(batch: BatchLike) -> dict[str, float]:
    """The host numbers that a batch reports, if it does."""
    stats = getattr(batch, "stats", None)
    return dict(stats()) if callable(stats) else {}


@dataclass(frozen=True)
class _Window:
    """Of a step, over all its micro-batches and ranks: tokens behind each loss, and the losses' weights."""

    counts: Mapping[str, Tensor]
    weights: Mapping[str, Tensor | float]


def _survey(engine: Engine, batches: Sequence[BatchLike], step: int, world: World, sums: StepSums) -> _Window | None:
    """Counts and weights of a window of several micro-batches, where the stage cannot tell them before."""
    needed = getattr(engine.stage, "needs_survey", None)
    if len(batches) == 1 or needed is None or not any(needed(batch) for batch in batches):
        return None
    found = []
    with engine.evaluating():
        for batch in batches:
            found.append(_local_sums(engine.ds(batch)))
            sums.note_work(engine.stage)
    names = found[0][0]
    sums_K2 = world.all_reduce(torch.stack([sums_K2 for _, sums_K2 in found]).sum(0))
    weights = engine.stage.loss_weights(_means(names, sums_K2), step)
    return _Window(dict(zip(names, sums_K2[:, 1], strict=True)), weights)


def _means(names: Sequence[str], sums_K2: Tensor) -> dict[str, Tensor]:
    """Token mean of each loss; NaN where it has no tokens."""
    means_K = torch.where(sums_K2[:, 1] > 0, sums_K2[:, 0] / sums_K2[:, 1].clamp(min=1), torch.nan)
    return dict(zip(names, means_K, strict=True))


def _check_counted(known: Mapping[str, Tensor], names: Sequence[str], batches: Sequence[BatchLike]) -> None:
    """Refuse a window whose loss would be scaled by the tokens of one micro-batch alone."""
    if len(batches) > 1 and not set(names) <= known.keys():
        late = ", ".join(sorted(set(names) - known.keys()))
        raise ValueError(f"the stage knows the tokens of {late} only after its forward: needs_survey must say so")


def _known_counts(stage: Any, batches: Sequence[BatchLike], world: World) -> dict[str, Tensor]:
    """Tokens of each loss over the whole accumulation window and all ranks, where they are known before a forward."""
    counts: dict[str, int] = {}
    for batch in batches:
        for name, count in stage.known_counts(batch).items():
            counts[name] = counts.get(name, 0) + count
    names = sorted(counts)
    if not names:
        return {}
    packed_K = torch.tensor([counts[name] for name in names], dtype=torch.float64).to(world.device, non_blocking=True)
    return dict(zip(names, world.all_reduce(packed_K), strict=True))


def _local_sums(terms: Mapping[str, LossTermLike]) -> tuple[tuple[str, ...], Tensor]:
    names = tuple(sorted(terms))
    rows = [torch.stack([terms[name].total.detach().double(), terms[name].count.detach().double()]) for name in names]
    return names, torch.stack(rows)


def _account(batch: BatchLike, world: World) -> Tensor:
    vector = getattr(batch, "account", None)
    if vector is None:
        return torch.zeros(0, dtype=torch.float64, device=world.device)
    return torch.from_numpy(vector).to(world.device, non_blocking=True)


def _global_sums(
    terms: Mapping[str, LossTermLike], account_A: Tensor, world: World
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """All losses and the account in one all-reduce: row k is [sum of token losses, tokens] of loss k over the ranks."""
    names, packed_K2 = _local_sums(terms)
    summed = world.all_reduce(torch.cat([packed_K2.flatten(), account_A]))
    return names, summed[: packed_K2.numel()].view_as(packed_K2), summed[packed_K2.numel() :]
