from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.models.echo import TriggerRule, segment_rows, trigger_segments
from tests.counters import Kernels


def _cuts(scores: list[float], rule: TriggerRule) -> list[int]:
    """The trigger as a reader would do it on one row while streaming."""
    segment, start, out = 0, 0, []
    for t, score in enumerate(scores):
        out.append(segment)
        if t + rule.look_ahead >= len(scores):
            continue  # not enough is known yet; the end flushes the rest
        peak = score == max(scores[max(0, t - rule.look_ahead) : t + rule.look_ahead + 1])
        waited = t - start
        if peak and (waited >= rule.max_wait or (waited >= rule.min_tokens and score > rule.threshold)):
            segment, start = segment + 1, t + 1
    return out


def test_trigger_equals_a_row_by_row_reading() -> None:
    torch.manual_seed(0)
    rule = TriggerRule(min_tokens=6, max_wait=15, threshold=0.2, look_ahead=3)
    scores = torch.randn(8, 60) * 0.3
    lengths = torch.tensor([60, 1, 7, 33, 50, 59, 20, 44])
    mask = torch.arange(60)[None, :] < lengths[:, None]
    segments = trigger_segments(scores, mask, rule)
    for row, length in enumerate(lengths.tolist()):
        assert segments[row, :length].tolist() == _cuts(scores[row, :length].tolist(), rule)
    assert int(segments.max()) >= 3


def _over_time(scores_BR: Tensor, mask_BR: Tensor, rule: TriggerRule) -> Tensor:
    """All rows at once, position by position."""
    ahead = rule.look_ahead
    padded = F.pad(scores_BR.masked_fill(~mask_BR, -torch.inf), (ahead, ahead), value=-torch.inf)
    peak = (scores_BR >= padded.unfold(1, 2 * ahead + 1, 1).amax(-1)) & mask_BR & F.pad(mask_BR, (0, ahead))[:, ahead:]
    segment = torch.zeros(len(scores_BR), dtype=torch.long)
    start, out = torch.zeros_like(segment), []
    for t in range(scores_BR.shape[1]):
        out.append(segment)
        waited = t - start
        early = (waited >= rule.min_tokens) & (scores_BR[:, t] > rule.threshold)
        cut = peak[:, t] & ((waited >= rule.max_wait) | early)
        segment = segment + cut
        start = torch.where(cut, torch.full_like(start, t + 1), start)
    return torch.stack(out, dim=1)


def test_trigger_equals_a_loop_over_time_whatever_the_rule() -> None:
    torch.manual_seed(1)
    chance, most = random.Random(1), 0
    for size in (1, 2, 7, 60, 164):
        for _ in range(12):
            waits = chance.choice([0, 1, 5, 20, 200]), chance.choice([0, 3, 15, 50, 300])
            rule = TriggerRule(*waits, threshold=0.1, look_ahead=chance.choice([0, 1, 5]))
            scores = torch.randn(5, size).round(decimals=1)  # with ties
            mask = torch.arange(size)[None, :] < torch.randint(0, size + 1, (5, 1))
            found = trigger_segments(scores, mask, rule)
            assert torch.equal(found, _over_time(scores, mask, rule))
            most = max(most, int(found.max()))
    assert most > 20


def test_trigger_has_few_kernels_at_any_length() -> None:
    for size, most in ((164, 38), (500, 44)):
        scores, mask = torch.randn(4, size), torch.ones(4, size, dtype=torch.bool)
        with Kernels() as kernels:
            trigger_segments(scores, mask, TriggerRule())
        assert len(kernels.noted) == most


def test_trigger_needs_the_wait_and_the_threshold() -> None:
    rule = TriggerRule(min_tokens=20, max_wait=50, threshold=0.1, look_ahead=5)
    scores = torch.full((1, 100), -1.0)
    scores[0, 10], scores[0, 25], scores[0, 30 + 51] = 0.9, 0.5, 0.05
    segments = trigger_segments(scores, torch.ones(1, 100, dtype=torch.bool), rule)
    ends = (segments[0, 1:] != segments[0, :-1]).nonzero().flatten().tolist()
    assert ends == [25, 81], "cut at 25 (20 waited, above threshold) and 81 (50 waited, any peak), not at 10"


def test_segment_rows_move_every_position_to_its_own_row() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 9, 9], [0, 1, 2, 9, 9, 9], [0] * 6])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 3 + [False] * 3, [False] * 6])
    rows = segment_rows(segment, mask)
    values = torch.arange(24.0).view(4, 6, 1)
    moved = rows.scatter(values)[..., 0]
    expected = [[0.0, 1], [2, 3, 4], [5], [6, 7, 8, 9], [12], [13], [14]]
    assert [moved[n][rows.mask_NT[n]].tolist() for n in range(rows.rows)] == expected
    assert rows.owner_N.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_segment_rows_carry_gradients_back() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rows = segment_rows(torch.zeros(2, 3, dtype=torch.long), mask)
    values = torch.randn(2, 3, 4, requires_grad=True)
    rows.scatter(values).sum().backward()
    assert torch.equal(values.grad, mask[..., None].expand(-1, -1, 4).float())
