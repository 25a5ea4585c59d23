from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from echox.evaluate.report import COLUMNS, write_report

RESULT: dict[str, Any] = {
    "sets": {
        "sqa-heldout-phrasing": {
            "text_llm_acc": 1.0,
            "s2t_acc": 0.9667,
            "s2s_acc": 0.75,
            "s2t_strict_acc": 0.95,
            "s2s_strict_acc": 0.7,
            "interval_95": [0.575, 0.8],
            "cascade_acc": 0.8,
            "copy_acc": 0.983,
            "retention_paired": 0.737,
            "exact": 0.61,
            "wer": 0.21,
            "n": 60,
            "role": "validation",
            "about": "phrasings < never heard",
            "strict_rule": "answer alone",
            "relations": {
                "capital": {
                    "n": 7,
                    "s2t_strict": 0.857,
                    "s2s_strict": 0.571,
                    "cascade": 0.714,
                    "copy": 0.8,
                    "copy_n": 5,
                }
            },
        },
        "asr-heldout-real": {"wer": 0.12, "n": 54},
    },
    "phases": {"assets": 12.0, "s2t": 300.5},
    "reused": ["assets"],
    "peak_memory_gib": 9.87,
    "resynthesis_wer": 0.183,
    "original_wer": 0.091,
    "t2c_heldout_wer": 0.314,
    "t2c_heldout_exact": 0.425,
}
CURVES = {
    "s2t": [{"step": step, "loss/s2t": 4.0 - step, "lr/lora": 1e-4} for step in range(3)]
    + [{"step": 3, "valid/loss/s2t": 1.25}],
    "t2c": [{"step": 1, "loss/t2c": float("nan")}],
    "echo": [],
}
WAV = b"RIFF-not-really"
SAMPLES = [
    {
        "set": "sqa-heldout-phrasing",
        "question_text": "What is 1 < 2 & 3?",
        "question_wav": WAV,
        "answer_text": "<script>alert(1)</script>",
        "answer_wav": None,
        "reference_text": "Paris",
        "reference_wav": WAV + b"2",
        "judged_text": "parries",
        "cascade_text": "Paris & co",
        "ok": False,
    }
]


class Outline(HTMLParser):
    """Collects tags, attributes that load something, and checks nesting."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(tmp_path_factory.mktemp("report") / "deep" / "report.html", RESULT, CURVES, SAMPLES)
    return path.read_text()


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.loads and all(source.startswith("data:") for source in outline.loads)
    assert "script" not in outline.tags


def test_every_score_and_every_column_is_explained(page: str) -> None:
    for shown in (
        "96.7 %",
        "75.0 %",
        "70.0 % [57–80]",
        "80.0 %",
        "98.3 %",
        "61.0 %",
        "0.74",
        "21.0 %",
        "<td>60</td>",
        "12.0 %",
        "18.3 %",
        "9.1 %",
        "31.4 %",
        "42.5 %",
        "validation, strict: answer alone; phrasings &lt; never heard",
        "<td>capital</td><td>7</td><td>85.7 %</td><td>57.1 %</td><td>71.4 %</td><td>80.0 % of 5</td>",
        "9.9 GiB",
        "312.5 s",
    ):
        assert shown in page, shown
    for _, label, meaning in COLUMNS:
        assert f"<dt>{label}</dt><dd>{meaning}</dd>" in page
    assert "assets <small>(reused)</small>" in page


def test_curves_are_pictures_and_missing_ones_are_said(page: str) -> None:
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2  # t2c has a picture without a line, echo has nothing at all
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "<td>valid/loss/s2t</td><td>1.250</td><td>1.250</td>" in page
    assert "<td>loss/s2t</td><td>4.000</td><td>2.000</td>" in page
    assert "No metrics were recorded" in page
    assert "lr/lora" not in page


def test_samples_have_players_and_text_is_escaped(page: str) -> None:
    players = [base64.b64decode(wav) for wav in re.findall(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)", page)]
    assert players == [WAV, WAV + b"2"]
    assert "What is 1 &lt; 2 &amp; 3?" in page and "&lt;script&gt;" in page
    assert "<i>parries</i>" in page and "<i>Paris &amp; co</i>" in page and 'class="sample wrong"' in page


def test_an_empty_result_still_gives_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", {}, {}, []).read_text()
    assert "<h1>" in page and "<table>" not in page
