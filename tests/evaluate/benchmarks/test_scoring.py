"""Scores of a benchmark, computed again by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from echox.evaluate.benchmarks.records import Answered
from echox.evaluate.benchmarks.scoring import chance, judged, pooled, repeated, score
from echox.evaluate.benchmarks.survey import Benchmark, Item
from echox.evaluate.benchmarks.table import lines

GOLDS = ("Paris", "Lima", "Oslo", "Rome", "Cairo")
TEXTS = ("It is Paris.", "It is Lima.", "It is Oslo", "I do not know", "")
HEARD = ("it is paris", "it is lemon", "it is oslo", "it is Rome", "")
TAUGHT = ("it is paris", "it is lima", "it is", "", "Cairo")


def benchmark(count: int = 5) -> Benchmark:
    items = tuple(Item(str(n), "", (GOLDS[n],), 1.0) for n in range(count))
    return Benchmark("llama-questions", Path("x"), None, items, "aa")


def answers() -> dict[int, Answered]:
    return {
        n: Answered(number=n, text=TEXTS[n], heard=HEARD[n], cascade_heard=TAUGHT[n], units=[], seconds=n / 2,
                    failed=n % 2)
        for n in reversed(range(5))
    }  # fmt: skip


def test_every_score_is_what_it_says() -> None:
    found = score(judged(benchmark(), answers()))
    assert (found.n, found.s2t, found.s2s, found.cascade) == (5, 3 / 5, 3 / 5, 3 / 5)
    assert found.retention == 1.0 and found.retention_paired == pytest.approx(2 / 3)
    assert (found.silent, found.failed, found.seconds) == (1 / 5, 2 / 5, 1.0)
    # Words: 3 + 3 + 3 + 4; one substituted, and of "I do not know" against "it is Rome" three and one left out.
    assert found.wer == pytest.approx((1 + 4) / 13)
    p, n, z = 3 / 5, 5, 1.959963984540054
    centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.s2s_interval_95 == pytest.approx([(centre + s * reach) / (1 + z * z / n) for s in (-1, 1)])


def test_answers_in_another_language_are_compared_by_its_rules() -> None:
    one = Answered(number=0, text="利马是首都。", heard="利马是首府", cascade_heard="", units=[], seconds=0, failed=0)
    said = {n: replace(one, number=n) for n in range(5)}
    assert score(judged(benchmark(), said, "zh"), "zh").wer == pytest.approx(1 / 5)
    assert score(judged(benchmark(), said)).wer == 1.0
    results = {"judge": "j", "language": "zh", "benchmarks": {"b": {"runs": [], "repeated": {}, "published": []}}}
    (head,) = lines(results)
    assert " CER " in head and " WER " not in head and " WER " in next(lines({**results, "language": "en"}))


def test_nothing_right_in_text_has_no_retention() -> None:
    rows = {n: Answered(number=n, text="", heard="Paris", cascade_heard="", units=[], seconds=0, failed=0)
            for n in range(2)}  # fmt: skip
    found = score(judged(benchmark(2), rows))
    assert (found.s2t, found.s2s, found.retention, found.retention_paired) == (0, 0.5, None, None)


def test_chance_is_what_answers_to_other_questions_are_worth() -> None:
    names = [f"city{n}" for n in range(12)]
    assert chance(names, [[name] for name in names]) == 0.0, "no question keeps its own answer"
    assert chance(["yes"] * 12, [["yes"]] * 12) == 1.0, "one answer for all"
    # Every ordered pair of different questions is met once by 1, 2, … n - 1 places on: the expectation itself.
    golds = [["a"] if n < 3 else ["b"] for n in range(8)]
    said = ["a" if n < 5 else "b" for n in range(8)]
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    assert chance(said, golds) == pytest.approx(statistics.fmean(said[i] == golds[j][0] for i, j in pairs))
    assert chance(["a"], [["a"]]) is None
    long = [f"w{n % 7}" for n in range(40)]
    assert chance(long, [[word] for word in long]) == chance(long, [[word] for word in long]) > 0


def test_repeated_runs_have_a_mean_and_a_standard_deviation() -> None:
    few = {n: Answered(number=n, text=TEXTS[n], heard="", cascade_heard="", units=[], seconds=0, failed=0)
           for n in range(5)}  # fmt: skip
    scores = [score(judged(benchmark(), rows)) for rows in (answers(), answers(), few)]
    found = repeated(scores)
    assert found["runs"] == 3 and found["s2t"] == {"mean": pytest.approx(0.6), "sd": pytest.approx(0.0)}
    assert found["s2s"]["mean"] == pytest.approx(0.4)
    assert found["s2s"]["sd"] == pytest.approx(math.sqrt((2 * 0.2**2 + 0.4**2) / 2))
    assert repeated(scores[:1])["s2s"] == {"mean": 0.6, "sd": None}


def test_several_benchmarks_are_pooled_by_their_questions_and_averaged_as_papers_do() -> None:
    five = judged(benchmark(), answers())
    found = pooled([five, five[:1]])
    assert (found["n"], found["s2s"], found["s2t"]) == (6, 4 / 6, 4 / 6)
    assert found["average_s2s"] == pytest.approx((3 / 5 + 1) / 2)
    assert found["s2s_interval_95"][0] < 4 / 6 < found["s2s_interval_95"][1]
