"""Writes the report of a run, one HTML file with curves, tables and players, for readers new to the project."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echox.evaluate.columns import COLUMNS, RELATION_COLUMNS, Column, cell, note, percent
from echox.html import as_png, player, write_page

STAGES = {
    "s2t": (
        "Stage I: hear a question, write the answer",
        "A frozen speech encoder listens; small adapters learn to hand what it hears to a frozen text model, which "
        "answers in text. Two losses: <b>s2t</b>, how surprised the model is by the right answer, and <b>ctc</b>, how "
        "well the sound is lined up with its words.",
    ),
    "t2c": (
        "Stage II: turn text into speech units",
        "A small decoder learns how a sentence sounds, as a sequence of discrete speech units. Its loss, <b>t2c</b>, "
        "is its surprise at the right next unit. It becomes the teacher of Stage III.",
    ),
    "echo": (
        "Stage III: speak from what the model thinks",
        "The Echo decoder learns to make the same units from the text model's inner states instead of its words, so "
        "that speech comes from meaning. <b>echo</b> compares with what the teacher would say, <b>denoising</b> keeps "
        "the inner states close to the words, <b>s2t</b> keeps Stage I alive.",
    ),
}
_SHOWN_CURVES = ("loss/", "valid/loss/")


def write_report(
    path: Path,
    result: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    samples: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the report; the file needs nothing beside it.

    Args:
        path: the HTML file.
        result: what `result.json` holds: `sets` (name to the rows of `SetScore`, with `role` and `about` where known),
            and where known `phases`, `reused`, `peak_memory_gib`, `resynthesis_wer`, `original_wer` and
            `t2c_heldout_wer`, and `streaming` of `score_streaming`. Shares are between 0 and 1.
        curves: stage to rows of `step` and metrics; names that start with `loss/` or `valid/loss/` are drawn.
        samples: `question_text`, `question_wav`, `answer_text`, `answer_wav`, `reference_text`, `reference_wav`,
            `judged_text`, `ok`, and where known `set` and `cascade_text`; WAV entries are bytes or None.

    Returns:
        The path.
    """
    parts = [
        "<h1>EchoX: speech in, speech out</h1>",
        "<p>A text language model was taught to hear questions and to answer them aloud, in three training stages. "
        "This page shows how the training went, how well the result does on questions it has never heard, and what it "
        "sounds like.</p>",
        _results(result),
        _curves(curves),
        _samples(samples),
        _streaming(result),
        _costs(result),
    ]
    return write_page(path, "EchoX report", parts)


def _results(result: Mapping[str, Any]) -> str:
    sets: Mapping[str, Mapping[str, Any]] = result.get("sets", {})
    if not sets:
        return ""
    about = {name: "; ".join(filter(None, (note(row), row.get("about")))) for name, row in sets.items()}
    meanings = "".join(f"<dt>{column.label}</dt><dd>{column.meaning}</dd>" for column in COLUMNS)
    return (
        f"<h2>Results on held-out sets</h2>{_score_table('set', COLUMNS, sets, about)}{_ceiling(result)}"
        f"<h3>What the columns mean</h3><dl>{meanings}</dl>{_relations(sets)}"
    )


def _score_table(
    first: str, columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]
) -> str:
    head = "".join(f"<th>{column.label}</th>" for column in columns)
    lines = []
    for name, row in rows.items():
        small = f"<br><small>{html.escape(about[name])}</small>" if about.get(name) else ""
        cells = "".join(f"<td>{cell(column.key, row)}</td>" for column in columns)
        lines.append(f"<tr><td>{html.escape(name)}{small}</td>{cells}</tr>")
    return f"<table><tr><th>{html.escape(first)}</th>{head}</tr>{''.join(lines)}</table>"


def _relations(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The strict scores of each kind of question."""
    tables = [
        _score_table(f"{name}, by relation", RELATION_COLUMNS, row["relations"], {})
        for name, row in sets.items()
        if row.get("relations")
    ]
    return f"<h3>Which questions are answered</h3>{''.join(tables)}" if tables else ""


def _ceiling(result: Mapping[str, Any]) -> str:
    again, original = result.get("resynthesis_wer"), result.get("original_wer")
    if again is None or original is None:
        return ""
    taught, exact = result.get("t2c_heldout_wer"), result.get("t2c_heldout_exact")
    teacher = (
        ""
        if taught is None or exact is None
        else f" When the frozen T2C teacher speaks the same sentences from their text, it is <b>{percent(taught)}</b>, "
        f"and <b>{percent(exact)}</b> of them are heard word for word; the Echo decoder learns from what it says."
    )
    return (
        f"<p><b>How well units can be spoken at all.</b> The true units of held-out sentences, spoken again by the "
        f"vocoder, have a word error rate of <b>{percent(again)}</b>; the original recordings have "
        f"<b>{percent(original)}</b> under the same recogniser. No model that speaks through these units can be "
        f"clearer than the first number.{teacher}</p>"
    )


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    parts = []
    for stage, rows in curves.items():
        title, about = STAGES.get(stage, (stage, ""))
        names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(_SHOWN_CURVES)))
        picture = _plot(rows, names) if names else ""
        table = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_number(first)}</td><td>{_number(last)}</td></tr>"
            for name in names
            for first, last in [_ends(rows, name)]
        )
        shown = (
            f'<img class="curve" alt="loss curves of {html.escape(stage)}" src="data:image/png;base64,{picture}">'
            f"<table><tr><th>loss</th><th>first</th><th>last</th></tr>{table}</table>"
            if picture
            else '<p class="soft">No metrics were recorded.</p>'
        )
        parts.append(f"<h3>{html.escape(title)}</h3><p>{about}</p>{shown}")
    return f"<h2>The three stages of training</h2>{''.join(parts)}" if parts else ""


def _plot(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """The curves as a PNG in base64; training thin, validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        if not points:
            continue
        valid = name.startswith("valid/")
        axes.plot(
            *zip(*points, strict=True), label=name, lw=1.3, ls="--" if valid else "-", marker="o" if valid else None
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    return as_png(figure)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    parts = []
    for sample in samples:
        right = bool(sample["ok"])
        where = f'<span class="soft">{html.escape(str(sample["set"]))}</span> ' if sample.get("set") else ""
        columns = [
            ("Question", sample["question_text"], sample.get("question_wav")),
            ("The model's answer", sample["answer_text"], sample.get("answer_wav")),
            ("Reference", sample["reference_text"], sample.get("reference_wav")),
        ]
        cells = "".join(
            f"<div><h4>{title}</h4><p>{html.escape(str(text or ''))}</p>{player(wav)}</div>"
            for title, text, wav in columns
        )
        heard, taught = sample.get("judged_text"), sample.get("cascade_text")
        judged = f"<p>The recogniser heard: <i>{html.escape(heard)}</i></p>" if heard else ""
        if taught is not None:
            judged += f"<p>and, when the teacher spoke the same text: <i>{html.escape(taught or '(nothing)')}</i></p>"
        verdict = "right" if right else "wrong"
        parts.append(
            f'<div class="sample {"ok" if right else "wrong"}"><span class="mark">{verdict}</span>'
            f'{where}<div class="three">{cells}</div>{judged}</div>'
        )
    return (
        "<h2>Listen</h2><p>Held-out items, spread over each set, mistakes included. Right and wrong are the strict "
        f"verdict on the speech.</p>{''.join(parts)}"
    )


def _streaming(result: Mapping[str, Any]) -> str:
    rows = streaming_rows(result.get("streaming") or {})
    if not rows:
        return ""
    cells = "".join(f"<tr><td>{label}</td><td>{value}</td></tr>" for label, value in rows)
    return (
        "<h2>How soon it answers</h2><p>Answers streamed one at a time, from the end of the question on, on the "
        "machine of the evaluation. The first words are spoken while the rest is still being written. Processor "
        "seconds are those of all its cores, and do not depend on what else the machine did.</p>"
        f"<table><tr><th>streamed answers</th><th></th></tr>{cells}</table>"
    )


def streaming_rows(streaming: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and value of each number of `score_streaming`; none where nothing was measured."""
    if not streaming.get("n"):
        return []
    units = {"ms": lambda value: f"{value:.0f} ms", "factor": lambda value: f"{value:.2f}"}
    shown = {
        "first_text_ms": ("first token, median", "ms"),
        "first_audio_ms": ("first sound, median", "ms"),
        "first_audio_p90_ms": ("first sound, nine of ten", "ms"),
        "first_audio_cpu_ms": ("processor time until then, median", "ms"),
        "real_time_factor": ("real-time factor: seconds a second of speech", "factor"),
        "real_time_factor_cpu": ("the same in processor seconds", "factor"),
        "gaps": ("times the sound ran out, an answer", "factor"),
    }
    measured = [(label, units[unit](streaming[key])) for key, (label, unit) in shown.items() if key in streaming]
    return [("answers", f"{streaming['n']:.0f}"), *measured]


def _costs(result: Mapping[str, Any]) -> str:
    phases: Mapping[str, float] = result.get("phases", {})
    if not phases:
        return ""
    reused = set(result.get("reused", ()))
    note = {name: " <small>(reused)</small>" if name in reused else "" for name in phases}
    rows = "".join(
        f"<tr><td>{html.escape(name)}{note[name]}</td><td>{seconds:.1f} s</td></tr>" for name, seconds in phases.items()
    )
    peak = result.get("peak_memory_gib")
    memory = f"<p>Most memory held at once by all processes: <b>{peak:.1f} GiB</b>.</p>" if peak else ""
    total = f"<tr><td><b>in all</b></td><td><b>{sum(phases.values()):.1f} s</b></td></tr>"
    return f"<h2>What it took</h2><table><tr><th>phase</th><th>time</th></tr>{rows}{total}</table>{memory}"


def _ends(rows: Sequence[Mapping[str, float]], name: str) -> tuple[float | None, float | None]:
    values = [row[name] for row in rows if name in row]
    return (values[0], values[-1]) if values else (None, None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
