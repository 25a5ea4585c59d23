from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from echox.evaluate.columns import COLUMNS
from echox.evaluate.report import write_report

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
            "quality": {
                "echo": {"n": 11, "ovrl": 2.718, "sig": 3.1, "bak": 3.9, "p808": 3.25},
                "copy": {"n": 12, "ovrl": 2.9, "sig": 3.2, "bak": 4.0, "p808": 3.5},
            },
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
    "streaming": {"n": 10, "first_audio_ms": 812.0, "real_time_factor": 0.47},
    "judge": "some/judge",
    "command": "echox evaluate 'my runs/echo' --limit 60",
}
COMMANDS = {
    "s2t": "echox train runs/s2t/recipe.json",
    "text_llm_acc": "echox shards build demo --scale demo",
    "phases": "python -m launch.demo",
}
CURVES = {
    "s2t": [{"step": step, "loss/s2t": 4.0 - step, "lr/lora": 1e-4} for step in range(3)]
    + [{"step": 3, "valid/loss/s2t": 1.25, "valid/loss/ctc": -0.5}],
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
    },
    {
        "set": "sqa-heldout-phrasing",
        "question_text": "Where is Peru?",
        "question_wav": WAV + b"q",
        "answer_text": "Peru is in South America.",
        "answer_wav": WAV + b"a",
        "cascade_wav": WAV + b"c",
        "cascade_text": "Peru is in South America",
        "reference_text": "It is in South America.",
        "reference_wav": WAV + b"r",
        "copy_text": "It is in south Africa",
        "judged_text": "peru's is <b>in</b> south a miracle now",
        "ok": False,
    },
    {
        "set": "asr-heldout-real",
        "question_text": "That is full.",
        "question_wav": WAV,
        "answer_text": "that is fool",
        "answer_wav": None,
        "reference_text": "That is full.",
        "reference_wav": None,
        "judged_text": "",
        "ok": False,
    },
]


class Outline(HTMLParser):
    """Collects tags, attributes that load something, and checks nesting."""

    VOID = frozenset({"meta", "img", "br"})
    LOADING = ("src", "href", "xlink:href", "srcset", "poster", "data", "action", "style", "background")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in self.LOADING and value]
        self.loads += [value for _, value in attrs if value and "url(" in value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(tmp_path_factory.mktemp("report") / "deep" / "report.html", RESULT, CURVES, SAMPLES, COMMANDS)
    return path.read_text()


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    styles = r"(fill|stroke|font|text-anchor|stroke-[a-z]+|[a-z-]+): "
    kept = [source for source in outline.loads if not re.match(styles, source)]
    inside = ("data:", "#", "url(#")  # of the page itself
    assert kept and all(source.startswith(inside) for source in kept), kept
    assert not any(re.search(r"url\((?!#)", source) for source in outline.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(outline.tags)
    assert "@import" not in page and "<!DOCTYPE svg" not in page
    # What is left of addresses names the vocabulary of SVG, and is never fetched.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


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


def test_curves_are_drawn_on_a_logarithmic_axis_and_missing_ones_are_said(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 2  # t2c has a picture without a line, echo has nothing at all
    assert 'aria-label="loss curves of s2t"' in pictures[0] and 'aria-label="loss curves of t2c"' in pictures[1]
    assert "nats a token" in pictures[0] and ">loss/s2t<" in pictures[0]
    names = [set(re.findall(r' id="([^"]+)"', picture)) for picture in pictures]
    assert "image" not in pictures[0] and len(names[0]) > 3
    # Losses 4, 3 and 2 at even steps: on a logarithmic axis the second fall is the greater one.
    line = next(path for path in re.findall(r'<path d="([^"]+)" clip-path', pictures[0]) if path.count("L") == 2)
    heights = [float(point.split()[1]) for point in re.findall(r"[ML] ([\d. ]+)", line)]
    first, second = heights[1] - heights[0], heights[2] - heights[1]  # downwards
    assert first > 0 and second / first == pytest.approx(math.log(3 / 2) / math.log(4 / 3), rel=1e-3)
    assert "<td>valid/loss/s2t</td><td>1.250</td><td>1.250</td>" in page
    assert "<td>valid/loss/ctc</td><td>-0.500</td><td>-0.500</td>" in page, "which cannot be drawn"
    assert "<td>loss/s2t</td><td>4.000</td><td>2.000</td>" in page
    assert "No metrics were recorded" in page
    assert "lr/lora" not in page


def test_five_columns_are_played_and_text_is_escaped(page: str) -> None:
    players = [base64.b64decode(wav) for wav in re.findall(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)", page)]
    assert players == [WAV, WAV + b"2", *(WAV + part for part in (b"q", b"c", b"r", b"a")), WAV]
    assert "What is 1 &lt; 2 &amp; 3?" in page and "&lt;script&gt;" in page and "<b>in</b>" not in page
    assert "<i>parries</i>" in page and 'class="sample wrong"' in page
    cards = re.findall(r'<div class="five">.*?</div></div>', page)
    assert len(cards) == 3 and all(card.count("<h4>") == 5 for card in cards)
    assert page.index("<h3>sqa-heldout-phrasing</h3>") < page.index("<h3>asr-heldout-real</h3>")


def test_words_heard_otherwise_are_marked(page: str) -> None:
    silent, spoken, written = re.findall(r'<div class="five">.*?</div></div>', page)
    transcript = spoken.split("What was heard of it</h4><p>")[1].split("</p>")[0]
    # There are several shortest ways to edit one into the other; each keeps these words and marks those.
    assert transcript.startswith("peru is <ins>is</ins> in south <") and "<del>america</del>" in transcript
    assert " ".join(re.sub("<del>.*?</del>|</?ins>", "", transcript).split()) == "peru is is in south a miracle now"
    assert "south <del>america</del> <ins>africa</ins>" in spoken.split("Reference")[1].split("<h4>")[0]
    cascade = spoken.split("by the cascade")[1].split("<h4>")[0]
    assert "<small>" not in cascade, "where nothing differs but case and punctuation, nothing is marked"
    assert "What was written of it" in written and "that is <del>full</del> <ins>fool</ins>" in written
    assert "What was heard of it" in silent


def test_every_number_stands_beside_the_command_that_makes_it(page: str) -> None:
    evaluated = "<code>echox evaluate &#x27;my runs/echo&#x27; --limit 60</code>"
    for heading, command in (
        ("Results on held-out sets", evaluated),
        ("Results on held-out sets", "<code>echox shards build demo --scale demo</code>"),
        ("Stage I: ", "<code>echox train runs/s2t/recipe.json</code>"),
        ("How soon it answers", evaluated),
        ("What it took", "<code>python -m launch.demo</code>"),
    ):
        assert command in page.split(heading, 1)[1].split("<h2>")[0], heading
    assert "<b>some/judge</b>" in page and "812 ms" in page and "0.47" in page


def test_the_quality_of_each_voice_is_shown(page: str) -> None:
    assert "<td>2.72 of 11</td>" in page
    assert "<td>Echo</td><td>11</td><td>2.72</td><td>3.10</td><td>3.90</td><td>3.25</td>" in page
    assert "<td>copy</td><td>12</td><td>2.90</td>" in page and "<td>cascade</td>" not in page


def test_an_empty_result_still_gives_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", {}, {}, []).read_text()
    assert "<h1>" in page and "<table>" not in page
