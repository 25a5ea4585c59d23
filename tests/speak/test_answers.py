"""The events of one answer: sound is made while they are taken, and only as far as somebody wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from echox.models.trigger import FixedCutter
from echox.speak.answers import Answer
from echox.speak.events import Audio, Done, Failed, SegmentCut, TextToken, Units
from echox.speak.incremental_text import IncrementalText
from echox.speak.vocoder import UnitMelVocoder
from tests.speak.voices import unit_mel

UNITS = np.random.default_rng(0).integers(0, 20, 150).astype(np.uint16)


class Counted(UnitMelVocoder):
    """Counts how many units it was given."""

    units = 0

    def stream(self) -> Any:
        made = super().stream()
        push = made.push

        def counted(units: Any) -> Any:
            self.units += len(units)
            return push(units)

        made.push = counted  # type: ignore[method-assign]
        return made


def said(vocoder: UnitMelVocoder, units: Any, asked: Callable[[], bool] | None = None) -> Answer:
    """An answer of one token, all of whose units came at once."""
    answer = Answer(IncrementalText(lambda tokens: "a" * len(tokens)), FixedCutter(None), vocoder, asked)
    answer.write(3)
    assert answer.know_state(torch.zeros(4), 0.5) is None
    segment = answer.end_text("end")
    assert segment is not None
    answer.say(segment, units, True, "")
    answer.finish()
    assert answer.finished
    return answer


def test_sound_is_given_before_the_sound_after_it_is_made() -> None:
    vocoder = Counted(unit_mel(20).model)
    given = []
    events = []
    for event in said(vocoder, UNITS).take():
        events.append(event)
        given += [vocoder.units] if isinstance(event, Audio) else []
    assert given[0] < 40 and len(given) > 10, "the first sound waits for no more units than it needs"
    assert sorted(set(given[:-1])) == given[:-1] and given[-1] == vocoder.units == len(UNITS)
    kinds = [type(event) for event in events]
    assert kinds == [TextToken, SegmentCut, Units, *[Audio] * len(given), Done]
    samples = np.concatenate([event.samples for event in events if isinstance(event, Audio)])
    assert np.array_equal(samples, unit_mel(20)([UNITS])[0])


def test_one_who_cancels_while_sound_is_made_hears_no_more_of_it() -> None:
    for by_flag in (True, False):
        vocoder, cancelled, after = Counted(unit_mel(20).model), False, []
        answer = said(vocoder, UNITS, None if by_flag else lambda: cancelled)  # noqa: B023
        for event in answer.take():
            after += [event] if cancelled else []
            if isinstance(event, Audio):
                cancelled, made = True, vocoder.units
                answer.cancelled = answer.cancelled or by_flag
        assert vocoder.units == made < 40
        assert after == [Done("a", "cancelled", 1, 1, 0)]


def test_units_that_the_vocoder_does_not_know_fail_their_segment_and_are_counted() -> None:
    unknown = np.array([*UNITS[:30], 20, *UNITS[30:]], np.uint16)
    events = list(said(unit_mel(20), unknown).take())
    assert [event for event in events if isinstance(event, Failed)] == [
        Failed(0, "Unit 20 is unknown to a vocoder of 20 units")
    ]
    assert events[-1] == Done("a", "end", 1, 1, 1)
