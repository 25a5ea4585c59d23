"""CTC from a row's own classes against `F.ctc_loss` on all logits: the loss, and gradients of states and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from echox.builders.setup import ctc_tokens
from echox.models import chunked_heads
from echox.models.chunked_heads import Head
from echox.models.ragged import Layout, rows_of
from echox.models.speech import CtcHead
from echox.stages.losses import ctc_loss

CLASSES, WIDTH = 23, 6
TARGETS = {
    "plain": ([[3, 7, 9], [5, 1, 2]], [3, 3], [9, 6]),
    "repeated": ([[3, 3, 7, 3], [5, 5, 5, 0]], [4, 3], [9, 8]),
    "barely fits": ([[3, 3, 7, 3], [4, 6, 4, 6]], [4, 4], [5, 4]),
    "too long": ([[3, 3, 7, 3], [4, 6, 4, 6]], [4, 4], [4, 3]),
    "no target": ([[3, 7], [0, 0]], [2, 0], [5, 5]),
    "padding that is a label": ([[3, 7, 3], [4, 4, 4]], [2, 1], [6, 4]),
    "without a class": ([[7, 0, 3], [0, 4, 0]], [3, 3], [7, 7]),
    "repeated around one without": ([[7, 0, 7], [3, 0, 0]], [3, 2], [3, 2]),
    "none with a class": ([[0, 0, 0], [4, 4, 0]], [3, 2], [7, 7]),
}


def head() -> CtcHead:
    torch.manual_seed(0)
    found = CtcHead(WIDTH, torch.arange(CLASSES) - 1, CLASSES)
    found.tokens[0] = CLASSES
    torch.nn.init.normal_(found.linear.weight)
    return found


def plain(logits_BTC: Tensor, classes: Tensor, frames: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    """torch's loss of each row alone, its labels without a class left out."""
    log_probs, total = logits_BTC.log_softmax(-1), logits_BTC.new_zeros(())
    for row, (row_frames, row_length) in enumerate(zip(frames.tolist(), lengths.tolist(), strict=True)):
        target = [label for label in classes[row, :row_length].tolist() if label]
        if target:
            sizes = torch.tensor(row_frames), torch.tensor(len(target))
            one = F.ctc_loss(log_probs[row], torch.tensor(target), *sizes, reduction="sum", zero_infinity=True)
            total = total + one * weight[row]
    return total


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_ctc_on_a_rows_own_classes_is_torchs_on_all(
    case: str, layout: Layout, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_heads, "CHUNK_ELEMENTS", chunk)
    classes, lengths, frames = (torch.tensor(part) for part in TARGETS[case])
    classes_BC = torch.cat([classes, classes[:1]])  # and a row without weight
    lengths_B, frames_B = torch.cat([lengths, lengths[:1]]), torch.cat([frames, frames[:1]])
    weight_B = torch.tensor([1.0, 1.0, 0.0])
    tokens_BC = (classes_BC - 1).masked_fill(classes_BC == 0, CLASSES)
    ctc = head()
    assert torch.equal(ctc.classes(tokens_BC), classes_BC)
    clips_N = torch.cat([frames_B, torch.tensor([3])])  # the last is an earlier clip, of which nobody knows the text
    hidden_NTh = torch.randn(4, int(clips_N.max()), WIDTH).requires_grad_()
    rows = rows_of(clips_N, hidden_NTh.shape[1], layout)
    scores = ctc(rows.from_padded(hidden_NTh), rows, tokens_BC)
    assert scores.normaliser is not None and scores.chosen is not None and scores.classes_BC is not None
    term = ctc_loss(
        rows.to_padded(scores.normaliser)[:3],
        rows.to_padded(scores.chosen)[:3],
        scores.classes_BC,
        frames_B,
        lengths_B,
        weight_B,
    )
    logits_BTC = ctc.linear(hidden_NTh)
    expected = plain(logits_BTC[:3], classes_BC, frames_B, lengths_B, weight_B)
    assert case != "too long" or float(expected) == 0
    torch.testing.assert_close(term.total, expected, rtol=1e-5, atol=1e-5)
    assert int(term.count) == int(lengths_B[:2].sum())
    assert torch.equal(scores.labels[rows.real], logits_BTC.argmax(-1)[rows_of(clips_N, rows.size, "padded").real])
    ours = torch.autograd.grad(term.total, [hidden_NTh, ctc.linear.weight])
    theirs = torch.autograd.grad(expected, [hidden_NTh, ctc.linear.weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_ctc_of_many_frames_and_sharp_logits_keeps_its_digits() -> None:
    torch.manual_seed(3)
    classes_BC, frames = torch.randint(1, 400, (2, 30)), 300
    logits_BTC = (8 * torch.randn(2, frames, 400, dtype=torch.float64)).requires_grad_()
    lengths_B, frames_B, weight_B = torch.tensor([30, 11]), torch.tensor([frames, 120]), torch.ones(2)
    exact = plain(logits_BTC, classes_BC, frames_B, lengths_B, weight_B)
    single = logits_BTC.detach().float().requires_grad_()
    places = F.pad(classes_BC, (1, 0))[:, None].expand(-1, frames, -1)
    term = ctc_loss(single.logsumexp(-1), single.gather(2, places), classes_BC, frames_B, lengths_B, weight_B)
    usual = plain(single, classes_BC, frames_B, lengths_B, weight_B)
    (ours,), (theirs,), (right,) = (
        torch.autograd.grad(loss, of) for loss, of in ((term.total, single), (usual, single), (exact, logits_BTC))
    )
    torch.testing.assert_close(term.total.double(), exact, rtol=1e-6, atol=0)
    assert (ours - right).abs().max() < (theirs - right).abs().max() < 5e-3  # 1.5e-3 and 2.5e-3


def test_labels_without_a_class_make_no_path_count_twice() -> None:
    """Where all frames say nothing for sure, every place of such a label among them would be another such path."""
    logits_BTC = torch.zeros(1, 40, 5)
    logits_BTC[:, :, 0], logits_BTC[:, 20, 3] = 9.0, 18.0
    classes_BC, one = torch.tensor([[0, 0, 3, 0]]), torch.ones(1)
    places = F.pad(classes_BC, (1, 0))[:, None].expand(-1, 40, -1)
    sizes = torch.tensor([40]), torch.tensor([4])
    term = ctc_loss(logits_BTC.logsumexp(-1), logits_BTC.gather(2, places), classes_BC, *sizes, one)
    as_blanks = F.ctc_loss(logits_BTC.log_softmax(-1).transpose(0, 1), classes_BC, *sizes, reduction="sum")
    assert 0 < float(term.total) < 0.1 and float(as_blanks) < -1


def test_the_sizes_on_the_host_are_used_where_every_token_has_a_class() -> None:
    assert CtcHead(WIDTH, ctc_tokens(CLASSES, None), CLASSES).complete
    assert not CtcHead(WIDTH, ctc_tokens(CLASSES, [3, 5]), CLASSES).complete


def test_a_ctc_head_is_a_head() -> None:
    assert isinstance(head().linear, Head) and list(head().state_dict()) == ["tokens", "linear.weight"]
