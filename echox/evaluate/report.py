"""Writes the report of a run, one HTML file with curves, tables and players, for readers new to the project."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echox.config.languages import ENGLISH
from echox.evaluate.columns import COLUMNS, QUALITY_COLUMNS, RELATION_COLUMNS, Column, cell, in_language, note, percent
from echox.evaluate.normalization import error_rate_name
from echox.evaluate.players import listening
from echox.evaluate.quality import VOICES
from echox.html import as_svg, write_page

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
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Write the report; the file needs nothing beside it.

    Args:
        path: the HTML file.
        result: what `result.json` holds: `sets` (name to the rows of `SetScore`, with `role` and `about` where known),
            and where known `language`, `phases`, `reused`, `peak_memory_gib`, `resynthesis_wer`, `original_wer` and
            `t2c_heldout_wer`, `streaming` of `score_streaming`, `judge`, and `command`, which made all these. Shares
            are between 0 and 1.
        curves: stage to rows of `step` and metrics; names that start with `loss/` or `valid/loss/` are drawn.
        samples: `question_text`, `question_wav`, `answer_text`, `answer_wav`, `reference_text`, `reference_wav`,
            `judged_text`, `ok`, and where known `set`, `cascade_wav`, and `cascade_text` and `copy_text`, which were
            heard of the two; WAV entries are bytes or None.
        commands: what makes the curves of each stage, `text_llm_acc` and `phases`, where known.

    Returns:
        The path.
    """
    known = {**(commands or {}), **({"evaluation": result["command"]} if result.get("command") else {})}
    parts = [
        "<h1>EchoX: speech in, speech out</h1>",
        "<p>A text language model was taught to hear questions and to answer them aloud, in three training stages. "
        "This page shows how the training went, how well the result does on questions it has never heard, and what it "
        "sounds like.</p>",
        _results(result, known),
        listening(samples, result.get("language") or ENGLISH),
        _curves(curves, known),
        _streaming(result, known),
        _costs(result, known),
    ]
    return write_page(path, "EchoX report", parts)


def _results(result: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    sets: Mapping[str, Mapping[str, Any]] = result.get("sets", {})
    if not sets:
        return ""
    about = {name: "; ".join(filter(None, (note(row), row.get("about")))) for name, row in sets.items()}
    language = result.get("language") or ENGLISH
    shown = in_language(COLUMNS, language)
    meanings = "".join(f"<dt>{column.label}</dt><dd>{column.meaning}</dd>" for column in shown)
    told = "" if language == ENGLISH else f", told that the language is {html.escape(language)}"
    name = html.escape(result.get("judge") or "")
    judge = f"<p>Judge, who hears the speech: <b>{name}</b>{told}.</p>" if name else ""
    made = _made_by(commands, "evaluation") + (
        _made_by(commands, "text_llm_acc", "The text model's column")
        if any(row.get("text_llm_acc") is not None for row in sets.values())
        else ""
    )
    return (
        f"<h2>Results on held-out sets</h2>{judge}{_score_table('set', shown, sets, about)}{_ceiling(result)}{made}"
        f"<h3>What the columns mean</h3><dl>{meanings}</dl>{_quality(sets)}{_relations(sets)}"
    )


def _made_by(commands: Mapping[str, str], name: str, what: str = "These numbers") -> str:
    """The command that makes some numbers, where it is known."""
    command = commands.get(name)
    return f'<p class="soft">{what}: <code>{html.escape(command)}</code></p>' if command else ""


def _quality(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The opinions of DNSMOS on the three voices."""
    rated = {name: row["quality"] for name, row in sets.items() if row.get("quality")}
    if not rated:
        return ""
    tables = "".join(
        _score_table(name, QUALITY_COLUMNS, {VOICES[voice]: row for voice, row in voices.items()}, {})
        for name, voices in rated.items()
    )
    meanings = "; ".join(f"<b>{column.label}</b>: {column.meaning.rstrip('.')}" for column in QUALITY_COLUMNS)
    return (
        "<h3>How the speech sounds</h3><p>Opinions of listeners from 1 (bad) to 5 (excellent) that DNSMOS predicts, "
        "whatever is said, on items at even distances; the same for each voice. It was trained on calls, not on "
        f"synthetic speech: compare the voices of a table with each other. {meanings}.</p>{tables}"
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
    rate = "character error rate" if error_rate_name(result.get("language") or ENGLISH) == "CER" else "word error rate"
    return (
        f"<p><b>How well units can be spoken at all.</b> The true units of held-out sentences, spoken again by the "
        f"vocoder, have a {rate} of <b>{percent(again)}</b>; the original recordings have "
        f"<b>{percent(original)}</b> under the same recogniser. No model that speaks through these units can be "
        f"clearer than the first number.{teacher}</p>"
    )


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]], commands: Mapping[str, str]) -> str:
    parts = []
    for stage, rows in curves.items():
        title, about = STAGES.get(stage, (stage, ""))
        names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(_SHOWN_CURVES)))
        picture = _plot(rows, names, f"loss curves of {stage}") if names else ""
        table = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_number(first)}</td><td>{_number(last)}</td></tr>"
            for name in names
            for first, last in [_ends(rows, name)]
        )
        shown = (
            f"{picture}<table><tr><th>loss</th><th>first</th><th>last</th></tr>{table}</table>"
            if picture
            else '<p class="soft">No metrics were recorded.</p>'
        )
        made = _made_by(commands, stage, "This training, or what is left of it")
        parts.append(f"<h3>{html.escape(title)}</h3><p>{about}</p>{shown}{made}")
    about = "<p>Losses on a logarithmic axis; a value that is not above 0 is not drawn.</p>"
    return f"<h2>The three stages of training</h2>{about}{''.join(parts)}" if parts else ""


def _plot(rows: Sequence[Mapping[str, float]], names: Sequence[str], label: str) -> str:
    """The curves as SVG, losses on a logarithmic axis; training thin, validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and 0 < row[name] < math.inf]
        if not points:
            continue
        valid = name.startswith("valid/")
        axes.plot(
            *zip(*points, strict=True), label=name, lw=1.3, ls="--" if valid else "-", marker="o" if valid else None
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    return as_svg(figure, label)


def _streaming(result: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    rows = streaming_rows(result.get("streaming") or {})
    if not rows:
        return ""
    cells = "".join(f"<tr><td>{label}</td><td>{value}</td></tr>" for label, value in rows)
    return (
        "<h2>How soon it answers</h2><p>Answers streamed one at a time, from the end of the question on, on the "
        "machine of the evaluation. The first words are spoken while the rest is still being written. Processor "
        "seconds are those of all its cores, and do not depend on what else the machine did.</p>"
        f"<table><tr><th>streamed answers</th><th></th></tr>{cells}</table>{_made_by(commands, 'evaluation')}"
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


def _costs(result: Mapping[str, Any], commands: Mapping[str, str]) -> str:
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
    table = f"<table><tr><th>phase</th><th>time</th></tr>{rows}{total}</table>"
    return f"<h2>What it took</h2>{table}{memory}{_made_by(commands, 'phases')}"


def _ends(rows: Sequence[Mapping[str, float]], name: str) -> tuple[float | None, float | None]:
    values = [row[name] for row in rows if name in row]
    return (values[0], values[-1]) if values else (None, None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
