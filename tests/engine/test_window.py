"""The gradient of a step is that of the mean over all its tokens, however its samples are split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echox.config.schema import HealthConfig
from echox.engine.loss_guard import LossGuard
from echox.engine.step import StepSums, train_step
from echox.engine.world import World
from echox.models.greedy import DecodedUnits
from echox.stages.echo import EchoStage
from echox.stream.batch import SpeechBatch
from tests import tiny

ALONE = World(0, 1, torch.device("cpu"))
ROWS = 6
SHORT = (0, 3)
"""Rows whose response has three spoken tokens, as `tiny.speech_batch` makes them."""


class PlainEngine:
    """What `train_step` needs of an engine, in plain PyTorch: gradients add up in `grad`."""

    def __init__(self, stage: EchoStage) -> None:
        self.stage = stage
        self.ds = self
        self.forwards: list[bool] = []

    def __call__(self, batch: SpeechBatch) -> Any:
        self.forwards.append(torch.is_grad_enabled())
        return self.stage(batch)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None: ...

    def clear_gradients(self) -> None:
        self.stage.zero_grad()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.stage.eval()
        with torch.no_grad():
            yield
        self.stage.train()


class ChosenUnits(nn.Module):
    """A teacher whose units follow from the text alone; it never ends for a text of three tokens."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words
        self.asked: list[int] = []

    def forward(self, text_BLh: Tensor, mask_BL: Tensor, limit_N: Tensor, *_: Any) -> DecodedUnits:
        self.asked.append(len(text_BLh))
        lengths_N = mask_BL.sum(1) - len(tiny.PREFIX) - len(tiny.HEADER)
        first_N = ((text_BLh * mask_BL[:, :, None]).sum((1, 2)) * 100).long().remainder(self.words)
        place_M = torch.arange(12)
        words_NM = (first_N[:, None] + 5 * place_M).remainder(self.words)
        return DecodedUnits(words_NM, place_M < 2 * lengths_N[:, None], lengths_N > 3)


def blank(batch: SpeechBatch) -> SpeechBatch:
    """A row that only fills a micro-batch."""
    return replace(tiny.rows_of(batch, [1]), ids=[], weight_B=torch.zeros(1))


def stage(**echo: Any) -> EchoStage:
    made = tiny.echo_stage(**{"segmentation": {"mode": "none"}, "denoising": {"dropout": 0.0}, **echo}).train()
    made.teacher = ChosenUnits(made.echo.words)
    return made


def gradients(of: EchoStage) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def oracle(of: EchoStage, batch: SpeechBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one forward over all samples: Eq. 4 with token means."""
    of.zero_grad()
    terms = of(batch)
    means = {name: term.total / max(float(term.count), 1.0) for name, term in terms.items()}
    denoising = of.config.denoising
    if denoising.weighting == "fixed":
        share = denoising.weight
    else:
        echo, own = float(means["echo"].detach()), float(means["denoising"].detach())
        bound = terms["echo"].count > 0 and own > denoising.cap * echo
        share = denoising.cap * echo / own if bound else 1.0
    total = of.config.s2t_weight * means["s2t"] + means["echo"] + share * means["denoising"]
    total.backward()
    return {name: float(mean.detach()) for name, mean in means.items()} | {"total": float(total.detach())}, gradients(
        of
    )


def trained(of: EchoStage, batches: list[SpeechBatch]) -> tuple[PlainEngine, StepSums, dict[str, Tensor]]:
    engine = PlainEngine(of)
    sums = train_step(engine, batches, 0, ALONE, LossGuard(HealthConfig(), torch.device("cpu")))  # type: ignore[arg-type]
    return engine, sums, gradients(of)


def whole_step() -> SpeechBatch:
    """All samples, with own answers that are longer and shorter than the reference, and one that was rejected."""
    batch = tiny.speech_batch(ROWS, step=0)
    lengths = torch.tensor([3, 9, 0, 3, 7, 5])
    batch.own_mask_BR = torch.arange(9) < lengths[:, None]
    generator = torch.Generator().manual_seed(8)
    own = torch.randint(12, tiny.VOCABULARY, (ROWS, 9), generator=generator)
    batch.own_BR = own.masked_fill(~batch.own_mask_BR, 0)
    return batch


@pytest.mark.parametrize("pseudo_text", ["argmax_teacher_forced", "reference", "generated"])
@pytest.mark.parametrize("weighting", ["dynamic_cap", "fixed"])
@pytest.mark.parametrize(
    "split",
    [
        [range(ROWS)],
        [range(2), range(2, ROWS)],
        [range(5), [5]],
        [[5, 1], None, [0, 2, 3, 4]],
        [SHORT, [1, 2, 4, 5]],
    ],
    ids=["6", "2+4", "5+1", "2+blank+4", "2 rejected+4"],
)
def test_every_split_of_a_step_has_the_gradient_of_the_whole(split: Any, weighting: str, pseudo_text: str) -> None:
    whole = whole_step()
    model = stage(pseudo_text=pseudo_text, denoising={"dropout": 0.0, "weighting": weighting})
    losses, expected = oracle(model, whole)
    batches = [blank(whole) if rows is None else tiny.rows_of(whole, rows) for rows in split]
    _, sums, found = trained(model, batches)
    assert sums.means() == pytest.approx(losses, rel=1e-5)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7, name


def test_the_rejected_rows_are_a_micro_batch_without_a_unit_target() -> None:
    whole = tiny.speech_batch(ROWS, step=0)
    model = stage(pseudo_text="reference")
    assert float(model(tiny.rows_of(whole, SHORT))["echo"].count) == 0
    assert float(model(tiny.rows_of(whole, [1, 2, 4, 5]))["echo"].count) > 0


def test_a_step_without_any_usable_unit_still_learns_to_denoise() -> None:
    whole = tiny.rows_of(tiny.speech_batch(ROWS, step=0), SHORT)
    model = stage(pseudo_text="reference", s2t_weight=0.0)
    for batches in ([whole], [tiny.rows_of(whole, [0]), tiny.rows_of(whole, [1])]):
        _, sums, found = trained(model, batches)
        assert float(sums.weights["denoising"]) == 1.0 and sums.means().keys() == {"denoising", "s2t", "total"}
        assert float(found["denoising.inner.weight"].abs().sum()) > 0


def test_the_weight_of_the_denoising_loss_is_one_of_the_step() -> None:
    whole = tiny.speech_batch(ROWS, step=0)
    model = stage()
    _, one, _ = trained(model, [whole])
    _, two, _ = trained(model, [tiny.rows_of(whole, [0, 1, 2]), tiny.rows_of(whole, [3, 4, 5])])
    assert 0 < float(one.weights["denoising"]) < 1
    assert float(two.weights["denoising"]) == pytest.approx(float(one.weights["denoising"]), rel=1e-5)


def test_several_micro_batches_cost_a_forward_each_and_no_second_decoding() -> None:
    whole = tiny.speech_batch(ROWS, step=0)
    model = stage()
    engine, _, _ = trained(model, [whole])
    assert engine.forwards == [True] and len(model.teacher.asked) == 1
    model.teacher.asked.clear()
    engine, _, _ = trained(model, [tiny.rows_of(whole, [0, 1]), tiny.rows_of(whole, [2, 3, 4, 5])])
    assert engine.forwards == [False, False, True, True] and len(model.teacher.asked) == 2


def test_a_stage_that_hides_its_counts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.speech_batch(ROWS, step=0)
    monkeypatch.setattr(EchoStage, "needs_survey", lambda self, batch: False)
    with pytest.raises(ValueError, match="knows the tokens of denoising, echo only after its forward"):
        trained(stage(), [tiny.rows_of(whole, [0, 1]), tiny.rows_of(whole, [2, 3])])
