"""What is heard of unit sequences: each is judged once, by length, in groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echox.evaluate import listening
from echox.evaluate.listening import Listener


class Loud:
    """A vocoder that makes a wave as long as the units, and a judge that reads its length and level."""

    sample_rate = 16000

    def __init__(self) -> None:
        self.spoken: list[int] = []
        self.groups: list[list[int]] = []

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        self.spoken.append(len(units))
        return [np.full(len(each), each[0], np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        self.groups.append([len(wave) for wave in audio])
        return [f"{int(wave[0])}x{len(wave)}" for wave in audio]


def units(*rows: tuple[int, int]) -> list[Any]:
    return [np.full(count, unit, "<u2") for unit, count in rows]


def test_equal_units_are_judged_once_and_silence_not_at_all() -> None:
    loud = Loud()
    listener = Listener(loud, loud)
    asked = units((1, 4), (2, 2), (1, 4), (3, 0), (2, 3))
    seen: list[tuple[int, int]] = []
    assert listener.hear(asked, lambda *done: seen.append(done)) == ["1x4", "2x2", "1x4", "", "2x3"]
    assert loud.groups == [[2, 3, 4]] and listener.judged == 3 and seen == [(3, 3)]
    assert listener.hear([*units((2, 3), (9, 1)), np.full(4, 1, np.int64)]) == ["2x3", "9x1", "1x4"]
    assert loud.groups == [[2, 3, 4], [1]] and listener.judged == 4
    assert listener.hear([]) == [] and listener.hear(units((1, 4))) == ["1x4"] and listener.judged == 4


def test_many_are_spoken_and_judged_in_groups_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEARD_AT_ONCE", 5)
    monkeypatch.setattr(listening, "SPOKEN_AT_ONCE", 2)
    loud = Loud()
    lengths = [7, 1, 5, 3, 2, 6, 4]
    assert Listener(loud, loud).hear(units(*((1, n) for n in lengths))) == [f"1x{n}" for n in lengths]
    assert loud.groups == [[1, 2, 3, 4, 5], [6, 7]] and loud.spoken == [2, 2, 1, 2]


def test_the_judge_hears_sixteen_kilohertz() -> None:
    loud = Loud()
    loud.sample_rate = 8000
    assert [len(wave) for wave in Listener(loud, loud).speak(units((1, 40), (2, 80)))] == [80, 160]
