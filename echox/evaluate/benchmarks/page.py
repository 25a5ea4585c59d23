"""Writes the page of a benchmark run: scores with the command behind each, every question, and players."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import encode_wav
from echox.config.languages import ENGLISH
from echox.evaluate.benchmarks.catalogue import PUBLISHED_JUDGE
from echox.evaluate.benchmarks.scoring import Judged
from echox.evaluate.benchmarks.table import COLUMNS, cell, row_name, spread
from echox.evaluate.columns import Column, in_language, percent
from echox.html import player, write_page

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAYED = 50
"""Questions of a benchmark, from the first on, that have players."""


@dataclass(frozen=True)
class Sounds:
    """What the players of one question play, 16 kHz mono.

    Attributes:
        question, answer: both; None where there is nothing to play.
    """

    question: NDArray[np.float32] | None
    answer: NDArray[np.float32] | None


def write_benchmark_page(
    path: Path,
    results: Mapping[str, Any],
    items: Mapping[str, Sequence[Judged]],
    sounds: Mapping[str, Sequence[Sounds]],
) -> Path:
    """Write one HTML file that needs nothing beside it; texts from outside are escaped.

    Args:
        path: the file.
        results: see `evaluate_benchmarks`.
        items: by benchmark, every question with its greedy answer.
        sounds: by benchmark, those of the first questions.
    """
    columns = in_language(COLUMNS, results.get("language") or ENGLISH)
    parts = [
        "<h1>Spoken-question benchmarks</h1>",
        f"<p>Run <b>{html.escape(results['run'])}</b>, judge <b>{html.escape(results['judge'])}</b>, which finds the "
        f"language of each clip itself. Protocol: {html.escape(results['protocol'])}. DNSMOS rates some of the "
        "answers, at even distances, where it was fetched.</p>",
        *(_benchmark(name, found, results["judge"], columns) for name, found in results["benchmarks"].items()),
        _meanings(columns),
        *(_questions(name, rows, sounds.get(name, ())) for name, rows in items.items()),
    ]
    return write_page(path, "EchoX benchmarks", parts)


def _benchmark(name: str, found: Mapping[str, Any], judge: str, columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{column.label}</th>" for column in columns)
    shown = "".join(
        f"<tr><td>{html.escape(row_name(row))}<br><small>judge {html.escape(judge)}</small></td>"
        + "".join(f"<td>{cell(column.key, row)}</td>" for column in columns)
        + f'</tr><tr><td colspan="{len(columns) + 1}"><small><code>{html.escape(row["command"])}</code></small></td>'
        + "</tr>"
        for row in found["runs"]
    )
    if found["repeated"]:
        cells = "".join(f"<td>{spread(column.key, found['repeated'])}</td>" for column in columns)
        shown += f"<tr><td>mean ± sd of {found['repeated']['runs']}</td>{cells}</tr>"
    title = html.escape(found["title"])
    return (
        f"<h2>{title}</h2><table><tr><th>{html.escape(name)}</th>{head}</tr>{shown}</table>"
        f"{_published(found['published'])}"
    )


def _published(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(row['system'])}</td><td>{percent(row['s2s'])}</td>"
        f"<td>{html.escape(row['source'])}</td></tr>"
        for row in rows
    )
    return (
        f"<table><tr><th>published, judge {PUBLISHED_JUDGE}</th><th>S2S</th><th>source</th></tr>{cells}</table>"
        '<p class="soft">Numbers of others, not made here. A score under another judge is not comparable with them.</p>'
    )


def _meanings(columns: Sequence[Column]) -> str:
    return (
        "<h3>What the columns mean</h3><dl>"
        + "".join(f"<dt>{column.label}</dt><dd>{column.meaning}</dd>" for column in columns)
        + "</dl>"
    )


def _questions(name: str, rows: Sequence[Judged], sounds: Sequence[Sounds]) -> str:
    shown = [_question(row, sounds[place] if place < len(sounds) else None) for place, row in enumerate(rows)]
    return f"<h2>{html.escape(name)}: every question, greedy</h2>{''.join(shown)}"


def _question(row: Judged, sounds: Sounds | None) -> str:
    item, answer = row.item, row.answer
    columns = [
        (f"Question {item.id}", item.text or "(not written down)", _player(sounds.question if sounds else None)),
        ("Accepted", "; ".join(item.golds), ""),
        (f"The model's text: {_verdict(row.text_right)}", answer.text or "(nothing)", ""),
        (
            f"What the judge heard: {_verdict(row.speech_right)}",
            answer.heard or "(nothing)",
            _player(sounds.answer if sounds else None),
        ),
        (f"When the teacher spoke: {_verdict(row.cascade_right)}", answer.cascade_heard or "(nothing)", ""),
    ]
    cells = "".join(
        f"<div><h4>{html.escape(title)}</h4><p>{html.escape(text)}</p>{sound}</div>" for title, text, sound in columns
    )
    kind = "ok" if row.speech_right else "wrong"
    return (
        f'<div class="sample {kind}"><span class="mark">{_verdict(row.speech_right)}</span>'
        f'<div class="three">{cells}</div></div>'
    )


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def _player(wave: NDArray[np.float32] | None) -> str:
    return player(encode_wav(wave)) if wave is not None and len(wave) else ""
