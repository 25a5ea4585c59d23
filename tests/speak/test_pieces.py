"""Segments of unit tokens that mean units only together are spoken when they are whole, all others at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echox.speak.segments import SegmentSpeech
from echox.units.pieces import PieceLanguage
from tests import tiny

PIECES = ["▁1_2", "5", "_3"]


@pytest.mark.parametrize(
    ("bodies", "wanted"), [(PIECES, [[], [1, 25, 3]]), (["▁1_2", "_5", "_3"], [[1, 2], [5, 3]])], ids=["cut", "whole"]
)
def test_a_number_may_go_on_with_the_next_words(bodies: list[str], wanted: list[list[int]]) -> None:
    stage: Any = None
    speech: SegmentSpeech[str] = SegmentSpeech(stage, tiny.t2c_decoder(), PieceLanguage(bodies))
    speech._said, speech._most = {"a": 0}, {"a": 9}
    first = speech._spoken("a", np.array([0]), None)
    last = speech._spoken("a", np.array([1, 2]), True)
    assert [first.units.tolist(), last.units.tolist()] == wanted
    assert (first.over, last.over, last.failure) == (False, True, "")


def test_a_segment_that_is_closed_is_forgotten() -> None:
    stage: Any = None
    speech: SegmentSpeech[str] = SegmentSpeech(stage, tiny.t2c_decoder(), PieceLanguage(PIECES))
    speech._said, speech._most = {"a": 0}, {"a": 9}
    speech._spoken("a", np.array([0]), None)
    speech.close({"a"})
    assert not speech._words and not speech._said
