"""Segments that are opened while others decode, against each of them decoded alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echox.models.greedy import DecodeStep
from echox.models.open_segments import OpenSegments
from echox.models.t2c import T2CDecoder, TextPart
from tests import tiny
from tests.models.test_t2c import _placing_text

LENGTHS = (9, 3, 14, 1, 30, 6, 2, 11, 5)
LIMITS = (40, 90, 7, 25, 16, 300, 15, 33, 64)


def decoder_of(kind: str) -> T2CDecoder:
    """A decoder of random weights whose end is never far and never near."""
    if kind == "by columns":
        return tiny.t2c_decoder(seed=2)
    decoder = _placing_text("padded")
    decoder.window_units = 9.0 if kind == "within a window" else None
    return decoder


def text_of(numbers: list[int], decoder: T2CDecoder) -> TextPart:
    """Texts of the segments of these numbers, padded to the longest of them."""
    longest = max(LENGTHS[number] for number in numbers)
    values, mask = torch.zeros(len(numbers), longest, 32), torch.zeros(len(numbers), longest, dtype=torch.bool)
    starts = torch.zeros(len(numbers), longest)
    for row, number in enumerate(numbers):
        size = LENGTHS[number]
        values[row, :size] = torch.randn(size, 32, generator=torch.Generator().manual_seed(number))
        mask[row, :size] = True
        starts[row, :size] = 3.0 * torch.arange(size)
    placed = decoder.units_per_character is not None
    return TextPart([values], [mask], starts if placed else None)


def alone(decoder: T2CDecoder, number: int) -> tuple[list[int], bool]:
    text = text_of([number], decoder)
    found = decoder.greedy(text.left_padded(), torch.tensor([LIMITS[number]]), text.starts_NS)
    return found.words_NM[0][found.mask_NM[0]].tolist(), bool(found.ended_N)


class Heard:
    """What each segment said, and whether it ended."""

    def __init__(self, opened: OpenSegments[int]) -> None:
        self.opened = opened
        self.words: dict[int, list[int]] = {}
        self.ended: dict[int, bool] = {}

    def run(self, steps: int) -> None:
        for said in self.opened.run(steps):
            assert said.key not in self.ended, "it speaks after its end"
            self.words.setdefault(said.key, []).extend(said.words.tolist())
            if said.ended is not None:
                self.ended[said.key] = said.ended


@pytest.mark.parametrize("kind", ["by columns", "by characters", "within a window"])
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_a_segment_says_what_it_says_alone_whenever_it_is_opened(kind: str, steps: int) -> None:
    decoder = decoder_of(kind)
    opened: OpenSegments[int] = OpenSegments(decoder)
    heard = Heard(opened)
    for group in ([0, 1], [2], [3, 4, 5], [6], [7, 8]):
        opened.open(group, text_of(group, decoder), torch.tensor([LIMITS[number] for number in group]))
        heard.run(steps)
        heard.run(steps)
    while len(opened):
        heard.run(steps)
    expected = [alone(decoder, number) for number in range(len(LENGTHS))]
    assert [(heard.words[number], heard.ended[number]) for number in range(len(LENGTHS))] == expected
    assert {ended for _, ended in expected} == {True, False}
    assert len({len(words) for words, _ in expected}) >= 5
    assert opened._step is None and opened._rows == [], "the cache leaves with the last segment"


def test_the_end_may_come_as_the_word_after_the_last() -> None:
    decoder = decoder_of("by columns")
    ends = [number for number in range(len(LENGTHS)) if alone(decoder, number)[1] and alone(decoder, number)[0]]
    assert len(ends) >= 2
    for number in ends:
        words, _ = alone(decoder, number)
        for most in (len(words), len(words) - 1):
            opened: OpenSegments[int] = OpenSegments(decoder)
            heard = Heard(opened)
            opened.open([number], text_of([number], decoder), torch.tensor([most]))
            while len(opened):
                heard.run(3)
            assert heard.words[number] == words[:most] and heard.ended[number] == (most == len(words))


def test_a_closed_segment_leaves_and_the_others_do_not_notice() -> None:
    decoder = decoder_of("by columns")
    torch.nn.init.zeros_(decoder.head.weight[decoder.end])
    opened: OpenSegments[int] = OpenSegments(decoder)
    heard = Heard(opened)
    opened.open([0, 1, 5, 8], text_of([0, 1, 5, 8], decoder), torch.tensor([LIMITS[n] for n in (0, 1, 5, 8)]))
    heard.run(4)
    opened.close({0, 1})
    assert len(opened) == 2 and opened._step is not None and len(opened._step.words_NK) == 2
    while len(opened):
        heard.run(16)
    assert heard.ended.keys() == {5, 8}
    assert [(heard.words[number], heard.ended[number]) for number in (5, 8)] == [alone(decoder, 5), alone(decoder, 8)]
    opened.open([2], text_of([2], decoder), torch.tensor([4]))
    opened.close({2})
    assert len(opened) == 0 and opened._step is None and opened.run() == []


def test_the_cache_does_not_grow_with_how_long_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("by columns")
    torch.nn.init.zeros_(decoder.head.weight[decoder.end])
    opened: OpenSegments[int] = OpenSegments(decoder)
    said: dict[int, list[int]] = {}
    for number in range(40):
        opened.open([number], text_of([1], decoder), torch.tensor([20]))
        for piece in opened.run(16):
            said.setdefault(piece.key, []).extend(piece.words.tolist())
        assert len(opened), "some segment is always open"
        assert opened._columns <= 128
    assert said[0] == said[20] and len(said[0]) == 20


def test_a_text_that_leaves_no_room_says_nothing_and_has_no_end() -> None:
    decoder = decoder_of("by columns")
    opened: OpenSegments[int] = OpenSegments(decoder)
    values = torch.randn(1, decoder.max_positions + 1, 32)
    text = TextPart([values], [torch.ones(values.shape[:2], dtype=torch.bool)])
    opened.open([0], text, torch.tensor([9]))
    (said,) = opened.run()
    assert said.words.dtype == np.int64 and said.words.tolist() == [] and said.ended is False


def test_no_word_is_computed_after_the_end_of_all_that_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, steps = decoder_of("by columns"), []
    step = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self: (steps.append(1), step(self))[1])
    ends = [number for number in range(len(LENGTHS)) if alone(decoder, number)[1]]
    for group in ([ends[0]], [ends[1], ends[2]]):
        words = [alone(decoder, number)[0] for number in group]
        opened: OpenSegments[int] = OpenSegments(decoder)
        opened.open(group, text_of(group, decoder), torch.tensor([LIMITS[number] for number in group]))
        steps.clear()
        assert [said.words.tolist() for said in opened.run(100)] == words
        assert len(steps) == max(map(len, words)) + 1
