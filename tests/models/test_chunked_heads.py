"""Chunked heads against plain torch on whole logits: losses, gradients, choices, and how often a head is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.models import chunked_heads
from echox.models.causal_lm import logits_of
from echox.models.chunked_heads import (
    Head,
    best_classes,
    class_scores,
    expected_rows,
    frozen_cross_entropy,
    let_run_jobs,
    most_probable_by,
)
from tests import tiny

POSITIONS, WIDTH, CLASSES = 11, 8, 37


@pytest.fixture(params=[1, 2 * POSITIONS, 5 * CLASSES, 1 << 20], ids=["one", "two", "five", "all"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_heads, "CHUNK_ELEMENTS", request.param)


def head(*, trains: bool = True) -> Head:
    torch.manual_seed(1)
    return Head(WIDTH, CLASSES, bias=False).requires_grad_(trains)


def states(seed: int = 2) -> Tensor:
    return torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


def test_cross_entropy_under_a_frozen_head_is_torchs_own() -> None:
    linear, hidden = head(trains=False), states()
    targets, counted = torch.arange(POSITIONS) * 3 % CLASSES, torch.arange(POSITIONS) % 4 != 1
    found = frozen_cross_entropy(linear, hidden, targets, counted, CLASSES, best=True)
    logits = linear(hidden)
    expected = (F.cross_entropy(logits, targets, reduction="none") * counted).sum()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(gradients(0.3 * found.total, hidden), gradients(0.3 * expected, hidden))
    assert found.best is not None and torch.equal(found.best, logits.argmax(-1))
    with torch.no_grad():
        alone = frozen_cross_entropy(linear, hidden, targets, counted, CLASSES)
    assert alone.best is None and torch.equal(alone.total, found.total)


def test_scores_of_a_head_that_trains_have_torchs_gradients() -> None:
    linear, hidden = head(), states()
    classes = torch.randint(0, CLASSES, (POSITIONS, 3), generator=torch.Generator().manual_seed(3))
    classes[:, 2] = classes[:, 0]  # as a row that says a word twice asks for it
    found, logits = class_scores(linear, hidden, classes), linear(hidden)
    normaliser, chosen = logits.logsumexp(-1), logits.gather(1, classes)
    torch.testing.assert_close(found.normaliser, normaliser)
    torch.testing.assert_close(found.chosen, chosen)
    assert torch.equal(found.best, logits.argmax(-1))
    weights = torch.randn(POSITIONS, 4, generator=torch.Generator().manual_seed(4))
    ours = (found.normaliser * weights[:, 0]).sum() + (found.chosen * weights[:, 1:]).sum()
    theirs = (normaliser * weights[:, 0]).sum() + (chosen * weights[:, 1:]).sum()
    for mine, other in zip(
        gradients(ours, hidden, linear.weight), gradients(theirs, hidden, linear.weight), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    classes = torch.zeros(POSITIONS, 1, dtype=torch.long)
    linear, hidden = head(), states().detach()
    class_scores(linear, hidden, classes).normaliser.sum().backward()
    assert linear.weight.grad is not None and hidden.grad is None
    linear, hidden = head(trains=False), states()
    class_scores(linear, hidden, classes).normaliser.sum().backward()
    assert linear.weight.grad is None and hidden.grad is not None


def test_of_equal_logits_the_first_is_chosen_as_torch_does() -> None:
    linear, hidden = head(), states()
    with torch.no_grad():
        linear.weight.round_()
        hidden.round_()
        linear.weight[20:] = linear.weight[: CLASSES - 20]  # every class of these twice
        logits = linear(hidden)
        assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).sum() > 3
        expected = logits.argmax(-1)
        assert torch.equal(best_classes(linear, hidden), expected)
        assert torch.equal(most_probable_by(linear, hidden, CLASSES), expected)
        assert torch.equal(class_scores(linear, hidden, torch.zeros(POSITIONS, 1).long()).best, expected)


def test_expected_rows_of_a_table_are_the_softmax_written_out() -> None:
    linear, hidden, table = head(), states(), torch.randn(CLASSES - 1, 5, generator=torch.Generator().manual_seed(5))
    found = expected_rows(linear, hidden, table, 1)
    expected = linear(hidden).softmax(-1)[:, 1:] @ table
    torch.testing.assert_close(found, expected)
    weights = torch.arange(5.0)
    for mine, other in zip(
        gradients((found * weights).sum(), hidden, linear.weight),
        gradients((expected * weights).sum(), hidden, linear.weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_no_position_at_all_stays_in_the_graph() -> None:
    linear, hidden = head(), states()[:0]
    scores = class_scores(linear, hidden, torch.zeros(0, 1, dtype=torch.long))
    total = frozen_cross_entropy(
        head(trains=False), hidden, torch.zeros(0).long(), torch.zeros(0).bool(), CLASSES
    ).total
    (
        scores.normaliser.sum()
        + scores.chosen.sum()
        + total
        + expected_rows(linear, hidden, torch.ones(36, 2), 1).sum()
    ).backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any() and total == 0


def test_a_head_is_called_once_whatever_the_number_of_chunks() -> None:
    calls: list[Any] = []
    linear, hidden = head(), states()
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    linear.register_forward_hook(lambda *_: calls.append("after"))
    class_scores(linear, hidden, torch.zeros(POSITIONS, 1).long())
    best_classes(linear, hidden)
    expected_rows(linear, hidden, torch.ones(CLASSES, 2), 0).sum().backward()
    assert calls == ["before", "after"] * 3


def test_the_head_of_an_llm_is_called_once_by_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.s2t_model()
    name, calls = type(model.text_head).__name__, []
    assert name == "Linear" and isinstance(model.text_head, nn.Linear)
    model.text_head.register_forward_hook(lambda *_: calls.append("head"))
    hidden = torch.randn(1, POSITIONS, 32, requires_grad=True)
    targets = torch.arange(POSITIONS)[None]
    found = model.text_loss(hidden, targets, targets % 3 > 0, best=True)
    assert calls == ["head"] and torch.equal(model.best_tokens(hidden), found.best) and calls == ["head"] * 2
    logits = logits_of(model.causal_lm, hidden)
    expected = (F.cross_entropy(logits[0], targets[0], reduction="none") * (targets[0] % 3 > 0)).sum()
    torch.testing.assert_close(gradients(found.total, hidden), gradients(expected, hidden), rtol=1e-5, atol=1e-6)
    again = let_run_jobs(model.text_head)
    assert again is None and type(model.text_head).__mro__.count(chunked_heads.RunsJobs) == 1
