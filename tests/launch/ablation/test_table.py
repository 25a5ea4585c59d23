"""The comparison of arms: pooled intervals, the paired bootstrap against all resamples, and the table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from launch.ablation.arms import ARMS, chosen
from launch.ablation.table import by_question, compare, markdown, paired_difference, sign, spoken_by_teacher

NAME = "sqa-heldout-phrasing"
ECHO, CASCADE, REFERENCE = (next(arm for arm in ARMS if arm.name == name) for name in ("echo", "cascade", "reference"))


def item(number: int, text: bool, speech: bool, cascade: bool | None = True) -> dict[str, Any]:
    return {
        "id": f"q{number:03d}",
        "text": "Ghana is in Africa",
        "heard": "Ghana is in Africa" if speech else "Ghana is in Asia",
        "cascade_heard": None if cascade is None else "Ghana is in Africa" if cascade else "no",
        "text_right_strict": text,
        "speech_right_strict": speech,
        "cascade_right_strict": cascade,
    }


def scores(
    speech: list[bool], text: list[bool] | None = None, cascade: list[bool | None] | None = None
) -> dict[str, Any]:
    text, heard = text or [True] * len(speech), cascade or [True] * len(speech)
    rows = zip(text, speech, heard, strict=True)
    return {NAME: {"n": len(speech), "items": [item(number, *row) for number, row in enumerate(rows)]}}


def exact_interval(right: int, n: int) -> list[float]:
    """Ends of the Wilson interval by search: the shares p for which |right/n - p| is 1.96 standard errors."""
    grid = np.linspace(0, 1, 200_001)
    inside = grid[(right / n - grid) ** 2 <= 1.959963984540054**2 * grid * (1 - grid) / n + 1e-15]
    return [float(inside[0]), float(inside[-1])]


def test_items_of_all_seeds_are_pooled() -> None:
    base = {17: scores([True] * 8 + [False] * 2), 18: scores([True] * 5 + [False] * 5)}
    (row,) = compare([ECHO], {"echo": base})
    assert (row.n, row.seeds, row.s2s_strict_acc, row.over_seeds) == (20, [17, 18], 0.65, [0.5, 0.8])
    assert row.interval_95 == pytest.approx(exact_interval(13, 20), abs=2e-5)
    assert (row.difference, row.difference_95, row.here) == (None, None, None)
    (single,) = compare([ECHO], {"echo": {17: base[17]}})
    assert single.over_seeds is None


def test_shares_are_those_of_the_items() -> None:
    found = scores([True, True, False, False], [True, False, True, True], [True, False, False, True])
    (row,) = compare([ECHO], {"echo": {17: found}})
    assert (row.s2t_strict_acc, row.s2s_strict_acc, row.cascade_acc) == (0.75, 0.5, 0.5)
    assert row.retention_paired == pytest.approx(1 / 3)
    assert row.wer == 2 / 16, "two of four answers have one of four words wrong"


def test_all_sets_together_come_first_and_their_questions_are_different_ones() -> None:
    def two(first: list[bool], second: list[bool]) -> dict[str, Any]:
        return {"phrasing": scores(first)[NAME], "open": scores(second)[NAME]}

    base, other = two([True, True, True], [False, False]), two([False, False, False], [True, True])
    rows = compare([ECHO, REFERENCE], {"echo": {17: base}, "reference": {17: other}})
    assert [(row.set, row.arm, row.n) for row in rows] == [
        ("all", "echo", 5), ("all", "reference", 5),
        ("phrasing", "echo", 3), ("phrasing", "reference", 3), ("open", "echo", 2), ("open", "reference", 2),
    ]  # fmt: skip
    assert [row.s2s_strict_acc for row in rows[:2]] == [0.6, 0.4]
    assert rows[1].difference == pytest.approx(-0.2) and rows[5].difference == pytest.approx(1.0)


def test_the_cascade_is_the_base_arm_s_text_in_the_teacher_s_speech() -> None:
    found = scores([True, False, False, False], [True, True, True, False], [True, True, False, None])
    _, row = compare([ECHO, CASCADE], {"echo": {17: found}})
    assert (row.arm, row.n, row.s2s_strict_acc, row.retention_paired) == ("cascade", 3, 2 / 3, 2 / 3)
    assert row.difference == pytest.approx(1 / 3), "over the questions that both have"
    assert found[NAME]["items"][0]["heard"] == "Ghana is in Africa", "the base arm's own items stay"
    assert len(spoken_by_teacher(found)[NAME]["items"]) == 3


def all_resamples(difference: list[float]) -> list[float]:
    """The percentile interval of the exact bootstrap distribution: every way to draw n of n."""
    means = [sum(drawn) / len(drawn) for drawn in itertools.product(difference, repeat=len(difference))]
    return [float(end) for end in np.percentile(means, [2.5, 97.5])]


@pytest.mark.parametrize(
    "difference", [[1.0, 0.0, 0.0, -1.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.75, 0.0, 0.5], [-1.0, -1.0, -1.0, 0.0, -1.0]]
)
def test_the_paired_bootstrap_is_that_of_all_resamples(difference: list[float]) -> None:
    base = {str(number): 0.25 for number in range(len(difference))}
    arm = {str(number): 0.25 + value for number, value in enumerate(difference)}
    found, interval = paired_difference(arm, base)
    assert found == pytest.approx(sum(difference) / len(difference))
    assert interval == pytest.approx(all_resamples(difference), abs=0.05)
    assert (found, interval) == paired_difference(arm, base), "drawn with a fixed seed"


def test_pairs_are_of_the_same_question_in_any_order() -> None:
    assert paired_difference({"b": 1.0, "a": 0.0}, {"a": 0.0, "b": 1.0}) == (0.0, [0.0, 0.0])
    assert paired_difference({"a": 1.0, "x": 0.0}, {"a": 0.0, "y": 1.0}) == (1.0, [1.0, 1.0])
    assert paired_difference({"a": 1.0}, {"b": 1.0}) == (None, None)


def test_the_seeds_of_a_question_are_one_draw() -> None:
    runs = [scores([True, False])[NAME]["items"], scores([False, False])[NAME]["items"]]
    assert by_question(runs) == {"q000": 0.5, "q001": 0.0}


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.1, 0.2], "+"),
        ([-0.2, -0.1], "-"),
        ([-0.1, 0.1], "0"),
        ([0.0, 0.3], "0"),
        ([1e-17, 0.2], "0"),
        ([0.0, 0.0], "0"),
    ],
)
def test_a_sign_is_found_where_the_interval_does_not_span_zero(interval: list[float], expected: str) -> None:
    assert sign(interval) == expected


def test_pairing_finds_what_pooled_intervals_cannot() -> None:
    base = [True] * 70 + [False] * 30
    arm = [True] * 62 + [False] * 38
    first, second = compare([ECHO, REFERENCE], {"echo": {17: scores(base)}, "reference": {17: scores(arm)}})
    assert first.interval_95 is not None and second.interval_95 is not None
    assert first.interval_95[0] < second.interval_95[1], "the two overlap"
    assert second.difference == pytest.approx(-0.08) and second.here == "-" and second.paper == "-"


def test_the_table_shows_every_number_with_its_interval() -> None:
    arms = chosen("demo", ["reference", "cascade", "teacher-forced"])
    many = {
        "echo": {17: scores([True] * 70 + [False] * 30), 18: scores([True] * 80 + [False] * 20)},
        "reference": {17: scores([True] * 50 + [False] * 50), 18: scores([True] * 60 + [False] * 40)},
        "teacher-forced": {17: scores([True] * 72 + [False] * 28), 18: scores([True] * 78 + [False] * 22)},
    }
    text = markdown("demo", arms, compare(arms, many))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["echo"] == ["200", "100.0 %", "75.0 % [69 80]", "70–80", "100.0 %", "0.75", "6.2 %", "", "", ""]
    row = cells["reference"]
    assert row[:4] == ["200", "100.0 %", "55.0 % [48 62]", "50–60"] and row[-2:] == ["-", "-"]
    assert row[-3].startswith("-20.0 [-2") and row[-3].endswith("]")
    assert cells["teacher-forced"][-2:] == ["·", "0"] and cells["cascade"][-2:] == ["·", "+"]
    for arm in arms:
        assert f"- {arm.name}: {arm.asks}." in text
    assert text.startswith("# Ablation at scale demo, seed 17, 18\n") and f"## {NAME}" in text
