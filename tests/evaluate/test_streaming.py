"""When a streamed answer can be heard, by a clock that only the answer moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echox.evaluate import streaming
from echox.evaluate.report import write_report
from echox.evaluate.streaming import score_streaming, time_answer
from echox.speak.events import Audio, Done, Failed, TextToken


class Clock:
    """Wall and processor seconds of a model that takes known times."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    perf_counter = property(lambda self: lambda: self.wall)
    process_time = property(lambda self: lambda: self.cpu)

    def work(self, wall: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + 2 * wall


class Model:
    """Streams events, each after some seconds; the question's length is how much slower it gets."""

    def __init__(self, clock: Clock, steps: list[tuple[float, Any]]) -> None:
        self.clock, self.steps = clock, steps

    def stream(self, question: Any, vocoder: Any) -> Any:
        for wall, event in self.steps:
            self.clock.work(wall * len(question))
            yield event


def audio(seconds: float) -> Audio:
    return Audio(np.zeros(round(8000 * seconds), np.float32), 8000)


STEPS = [
    (0.2, TextToken(1, "a")),
    (0.3, audio(1.0)),  # heard from 0.5 s on
    (0.9, audio(0.5)),  # at 1.4 s: in time
    (1.0, Failed(0, "it has no end")),
    (0.0, audio(1.0)),  # at 2.4 s: the sound ran out at 2.0 s
    (0.6, Done("a", "end", 1, 1, 1)),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(streaming, "time", made)
    return made


def test_an_answer_is_timed_from_the_end_of_its_question(clock: Clock) -> None:
    found = time_answer(Model(clock, STEPS), None, np.zeros(1))  # type: ignore[arg-type]
    assert (found.text_s, found.audio_s, found.audio_cpu_s) == pytest.approx((0.2, 0.5, 1.0))
    assert (found.wall_s, found.cpu_s, found.spoken_s) == pytest.approx((3.0, 6.0, 2.5))
    assert (found.gaps, found.failed) == (1, 1)


def test_the_score_is_that_of_all_answers_that_are_heard(clock: Clock) -> None:
    questions = [np.zeros(size) for size in (1, 2, 9)]
    found = score_streaming(Model(clock, STEPS), None, questions)  # type: ignore[arg-type]
    assert found["n"] == 3 and found["first_text_ms"] == pytest.approx(400) and found["failed"] == 3
    assert (found["first_audio_ms"], found["first_audio_cpu_ms"]) == pytest.approx((1000, 2000))
    assert 1000 < found["first_audio_p90_ms"] < 4500
    assert (found["real_time_factor"], found["real_time_factor_cpu"]) == pytest.approx((36 / 7.5, 72 / 7.5))
    silent = Model(clock, [(0.1, Done("", "end", 0, 0, 0))])
    assert score_streaming(silent, None, questions) == {}  # type: ignore[arg-type]
    assert score_streaming(silent, None, []) == {}  # type: ignore[arg-type]


def test_the_report_shows_it(tmp_path: Any) -> None:
    result = {"streaming": {"n": 10, "first_audio_ms": 812.4, "real_time_factor": 0.834, "gaps": 0.1}}
    page = write_report(tmp_path / "report.html", result, {}, []).read_text()
    assert "How soon it answers" in page and "812 ms" in page and "0.83" in page
    assert "How soon it answers" not in write_report(tmp_path / "report.html", {}, {}, []).read_text()
