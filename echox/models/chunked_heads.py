"""Computes what losses and choices read of a head's logits in chunks: no tensor of positions × classes ever exists.

A loss reads two numbers of a position's logits, the logarithm of their summed exponentials and the logit of its target;
a choice reads which is the largest. A chunk of logits gives them and is forgotten. A backward computes it again, or has
its gradient from the forward where the head is frozen.

A head is called once for all chunks, on every rank however many those are: ZeRO-3 gathers the weights of a module
around its call, and ranks that called it in different numbers would wait for each other indefinitely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from echox.models.mixed import mix_into

CHUNK_ELEMENTS = 1 << 25
"""Logits of a chunk: 128 MiB in fp32, and four times that with what is computed of them."""

Job = Callable[[Tensor], Any]


class RunsJobs(nn.Module):
    """A head that can be called with a job, which then computes with its weights; they are there until it returns."""

    def forward(self, hidden: Tensor, job: Job | None = None) -> Any:
        """`super().forward(hidden)`, or the job's result."""
        return super().forward(hidden) if job is None else job(hidden)


class Head(RunsJobs, nn.Linear):
    """A linear map to classes that runs jobs."""


def let_run_jobs(head: nn.Module) -> None:
    """Make a head that belongs to another model run jobs, under the name of its class."""
    mix_into(head, RunsJobs)


class TextLoss(NamedTuple):
    """Sum of the cross-entropies that count, and the most probable class of each position where it was asked for."""

    total: Tensor
    best: Tensor | None


def frozen_cross_entropy(
    logits_of: Job, hidden_Rh: Tensor, targets_R: Tensor, counted_R: Tensor, classes: int, *, best: bool = False
) -> TextLoss:
    """Cross-entropy under a head that does not train, within a job of that head.

    The gradient with respect to a chunk's states is computed with its logits, so that a backward needs no head.

    Args:
        logits_of: the head: states `[R, h]` to logits `[R, V]`.
        hidden_Rh: states.
        targets_R: class of each.
        counted_R: which of them count.
        classes: V.
        best: also say which class of each is the most probable.
    """
    learns = torch.is_grad_enabled() and hidden_Rh.requires_grad
    total, best_R = _FrozenCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_Rh, logits_of, targets_R, counted_R, classes, best, learns
    )
    return TextLoss(total, best_R)


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_Rh: Tensor,
        logits_of: Job,
        targets_R: Tensor,
        counted_R: Tensor,
        classes: int,
        best: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor | None]:
        total = torch.zeros((), dtype=torch.float32, device=hidden_Rh.device)
        gradient_Rh = torch.empty_like(hidden_Rh) if learns else None
        best_R = torch.empty_like(targets_R) if best else None
        for part in _chunks(len(hidden_Rh), classes):
            with torch.set_grad_enabled(learns):
                hidden_rh = hidden_Rh[part].detach().requires_grad_(learns)
                logits_rV = logits_of(hidden_rh)
                losses_r = F.cross_entropy(logits_rV.float(), targets_R[part], reduction="none")
                loss = (losses_r * counted_R[part]).sum()
            total += loss.detach()
            if gradient_Rh is not None:
                gradient_Rh[part] = torch.autograd.grad(loss, hidden_rh)[0]
            if best_R is not None:
                best_R[part] = logits_rV.detach().argmax(-1)
        if gradient_Rh is not None:
            ctx.save_for_backward(gradient_Rh)
        if best_R is not None:
            ctx.mark_non_differentiable(best_R)
        return total, best_R

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient_Rh,) = ctx.saved_tensors
        return gradient_Rh * gradient.to(gradient_Rh.dtype), None, None, None, None, None, None


@torch.no_grad()
def most_probable_by(logits_of: Job, hidden_Rh: Tensor, classes: int) -> Tensor:
    """The class of the largest logit of each of the states, the first where several are as large: `[R]`."""
    best_R = torch.empty(len(hidden_Rh), dtype=torch.long, device=hidden_Rh.device)
    for part in _chunks(len(hidden_Rh), classes):
        best_R[part] = logits_of(hidden_Rh[part]).argmax(-1)
    return best_R


class ClassScores(NamedTuple):
    """What is read of each position's logits.

    Attributes:
        normaliser: logarithm of the sum of exponentials over all classes, float32.
        chosen: logits of the classes asked for, float32.
        best: the class with the largest logit.
    """

    normaliser: Tensor
    chosen: Tensor
    best: Tensor


def class_scores(head: Head, hidden_Th: Tensor, classes_TS: Tensor) -> ClassScores:
    """Scores `[T]`, `[T, S]` and `[T]` under a linear head without bias, which may train; S classes a position.

    Chunks are of classes, all positions at once, so that each row of the weight's gradient is written once.
    """

    def job(hidden_Th: Tensor) -> Any:
        return _ClassScores.apply(hidden_Th, head.weight, classes_TS)  # type: ignore[no-untyped-call]

    return ClassScores(*head(hidden_Th, job))


@torch.no_grad()
def best_classes(head: Head, hidden_Th: Tensor) -> Tensor:
    """The class with the largest logit of each position, the first where several are as large: `[T]`."""

    def job(hidden_Th: Tensor) -> Tensor:
        best = _Best(hidden_Th)
        for part in _chunks(len(head.weight), len(hidden_Th)):
            best.see(hidden_Th @ head.weight[part].T, part.start)
        return best.class_T

    found: Tensor = head(hidden_Th, job)
    return found


def expected_rows(head: Head, hidden_Th: Tensor, table_Ch: Tensor, first: int) -> Tensor:
    """The mean of the table's rows under the probabilities of the classes from `first` on: `[T, h]`."""

    def expected(hidden_th: Tensor) -> Tensor:
        weights_tC = F.linear(hidden_th, head.weight).float().softmax(-1)
        return weights_tC[:, first:].to(table_Ch.dtype) @ table_Ch

    def job(hidden_Th: Tensor) -> Tensor:
        parts = [
            checkpoint(expected, hidden_Th[part], use_reentrant=False, preserve_rng_state=False)
            for part in _chunks(max(len(hidden_Th), 1), len(head.weight))
        ]
        return torch.cat(parts)

    found: Tensor = head(hidden_Th, job)
    return found


class _ClassScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_Th: Tensor, weight_Ch: Tensor, classes_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = _Best(hidden_Th)
        normaliser_T = torch.full((len(hidden_Th),), -torch.inf, device=hidden_Th.device)
        chosen_TS = torch.zeros(classes_TS.shape, device=hidden_Th.device)
        for part in _chunks(len(weight_Ch), len(hidden_Th)):
            logits_Tc = hidden_Th @ weight_Ch[part].T
            best.see(logits_Tc, part.start)
            logits_Tc = logits_Tc.float()
            normaliser_T = torch.logaddexp(normaliser_T, logits_Tc.logsumexp(1))
            place_TS, here_TS = _places(classes_TS, part)
            chosen_TS = torch.where(here_TS, logits_Tc.gather(1, place_TS), chosen_TS)
        ctx.save_for_backward(hidden_Th, weight_Ch, classes_TS, normaliser_T)
        ctx.mark_non_differentiable(best.class_T)
        return normaliser_T, chosen_TS, best.class_T

    @staticmethod
    def backward(
        ctx: Any, of_normaliser_T: Tensor, of_chosen_TS: Tensor, _: Any
    ) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_Th, weight_Ch, classes_TS, normaliser_T = ctx.saved_tensors
        of_hidden_Th = torch.zeros(hidden_Th.shape, device=hidden_Th.device) if ctx.needs_input_grad[0] else None
        of_weight_Ch = torch.empty_like(weight_Ch) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(weight_Ch), len(hidden_Th)):
            of_logits_Tc = (hidden_Th @ weight_Ch[part].T).float()
            of_logits_Tc.sub_(normaliser_T[:, None]).exp_().mul_(of_normaliser_T[:, None])
            place_TS, here_TS = _places(classes_TS, part)
            of_logits_Tc.scatter_add_(1, place_TS, of_chosen_TS * here_TS)
            of_logits_Tc = of_logits_Tc.to(hidden_Th.dtype)
            if of_hidden_Th is not None:
                of_hidden_Th += of_logits_Tc @ weight_Ch[part]
            if of_weight_Ch is not None:
                torch.mm(of_logits_Tc.T, hidden_Th, out=of_weight_Ch[part])
        return None if of_hidden_Th is None else of_hidden_Th.to(hidden_Th.dtype), of_weight_Ch, None


class _Best:
    """The class with the largest logit so far of each position; of equals, the first."""

    def __init__(self, hidden_Th: Tensor) -> None:
        self.class_T = torch.zeros(len(hidden_Th), dtype=torch.long, device=hidden_Th.device)
        self._logit_T: Tensor | None = None

    def see(self, logits_Tc: Tensor, start: int) -> None:
        class_T = logits_Tc.argmax(1)
        logit_T = logits_Tc.gather(1, class_T[:, None])[:, 0]
        if self._logit_T is None:
            self.class_T, self._logit_T = class_T, logit_T
            return
        larger_T = logit_T > self._logit_T
        self.class_T = torch.where(larger_T, class_T + start, self.class_T)
        self._logit_T = torch.maximum(self._logit_T, logit_T)


def _places(classes_TS: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Where classes are in a part of all of them, and whether they are."""
    place_TS = classes_TS - part.start
    here_TS = (place_TS >= 0) & (classes_TS < part.stop)
    return place_TS.clamp(0, part.stop - part.start - 1), here_TS


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Parts of `count` things of `size` logits each."""
    step = max(1, CHUNK_ELEMENTS // max(size, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
