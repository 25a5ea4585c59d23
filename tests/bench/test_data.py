"""The data benchmark at a small size: every row is there and makes sense; how fast is for people to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echox.bench.table import Row, table
from echox.cli import main


def test_bench_data_measures_each_row_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "data", "--samples", "12", "--catalogue", "3000", "--repeats", "1", "--folder", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    rows = [Row(**row) for row in json.loads(capsys.readouterr().out)]
    assert all(row.value > 0 or row.name.startswith("private memory") for row in rows)
    assert {row.aim for row in rows} >= {"≥ 5 ×", "≥ 1.0 ×", "≥ 1.7 ×", "< 50 ms", "< 100 ms a million", "≥ 150,000"}
    assert any("0.003 M samples" in row.name for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_markdown() -> None:
    text = table([Row("a", 1234.5, "x/s"), Row("b", 0.5, "ms", 2.0, "a", "≥ 1 ×")])
    assert text.splitlines()[2:] == ["| a | 1,234 x/s |  |  |", "| b | 0.5 ms | 2.00 × a | ≥ 1 × |"]
