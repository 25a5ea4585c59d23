"""Cuts while a response is written, against those of the whole response, which training makes."""

from __future__ import annotations

import random

import torch

from echox.models.echo import TriggerRule, trigger_segments
from echox.models.trigger import Cutter, FixedCutter, StreamingTrigger


def ends_while_written(cutter: Cutter, scores: list[float]) -> list[tuple[int, int]]:
    """Ends of segments, each with the number of tokens that were there when it was known."""
    found = ((cutter.push(score), place + 1) for place, score in enumerate(scores))
    return [(end, known) for end, known in found if end is not None]


def ends_of_the_whole(scores: list[float], rule: TriggerRule) -> list[int]:
    (row,) = trigger_segments(torch.tensor([scores]), torch.ones(1, len(scores), dtype=torch.bool), rule).tolist()
    return [place for place in range(1, len(row)) if row[place] != row[place - 1]]


def test_every_beginning_of_a_response_is_cut_as_the_whole_of_it() -> None:
    chance, cuts = random.Random(4), 0
    for trial in range(60):
        waits = chance.choice([0, 1, 5, 20]), chance.choice([0, 3, 15, 50])
        rule = TriggerRule(*waits, threshold=0.1, look_ahead=chance.choice([1, 2, 5]))
        scores = [round(chance.gauss(0, 1), 1 if trial % 2 else 4) for _ in range(chance.choice([1, 4, 23, 70]))]
        found = ends_while_written(StreamingTrigger(rule), scores)
        for size in range(1, len(scores) + 1):
            written = [end for end, known in found if known <= size]
            assert written == ends_of_the_whole(scores[:size], rule)
        assert all(known == end + rule.look_ahead for end, known in found), "known as soon as what is ahead was seen"
        cuts += len(found)
    assert cuts > 200


def test_without_a_trigger_segments_have_one_length_or_there_is_one() -> None:
    assert ends_while_written(FixedCutter(3), [0.0] * 7) == [(3, 3), (6, 6)]
    assert ends_while_written(FixedCutter(None), [9.0] * 90) == []
