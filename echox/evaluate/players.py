"""Shows answers to listen to: five columns a question, and in its transcript the words that were heard otherwise."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from echox.config.languages import ENGLISH
from echox.evaluate.text import word_edits
from echox.html import player


def listening(samples: Sequence[Mapping[str, Any]], language: str = ENGLISH) -> str:
    """The part of a page with the samples of an evaluation, grouped by their set; empty without any.

    Args:
        samples: see `write_report`.
        language: of their texts, by Whisper's code.
    """
    if not samples:
        return ""
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("set") or ""), []).append(_sample(sample, language))
    shown = "".join(
        f"<h3>{html.escape(name)}</h3>{''.join(rows)}" if name else "".join(rows) for name, rows in groups.items()
    )
    return (
        "<h2>Listen</h2><p>Held-out items, spread over each set, mistakes included. Right and wrong are the strict "
        "verdict on Echo's speech. Texts and transcripts are compared word by word, without case and punctuation: "
        "<del>words that the recogniser missed</del>, <ins>words that it heard instead</ins>.</p>"
        f"{shown}"
    )


def marked_words(wanted: str, heard: str, language: str = ENGLISH) -> str:
    """What was heard, with the words that differ from the text marked; a text from outside is escaped."""
    parts = []
    for missed, got in word_edits(wanted, heard, language):
        if missed == got:
            parts.append(html.escape(got))
            continue
        parts += [f"<del>{html.escape(missed)}</del>"] if missed else []
        parts += [f"<ins>{html.escape(got)}</ins>"] if got else []
    return " ".join(parts) or "(nothing)"


def _sample(sample: Mapping[str, Any], language: str) -> str:
    right = bool(sample["ok"])
    text, reference = sample["answer_text"] or "", sample["reference_text"] or ""
    heard = sample.get("judged_text") or ""
    columns = [
        ("Question, recorded", html.escape(sample["question_text"] or ""), player(sample.get("question_wav"))),
        _voice("Text model by the cascade", text, sample.get("cascade_text"), sample.get("cascade_wav"), language),
        _voice(
            "Reference, its units spoken again",
            reference,
            sample.get("copy_text"),
            sample.get("reference_wav"),
            language,
        ),
        ("Our answer, by Echo", html.escape(text), player(sample.get("answer_wav"))),
        _transcript(sample, language),
    ]
    cells = "".join(f"<div><h4>{title}</h4><p>{shown}</p>{sound}</div>" for title, shown, sound in columns)
    verdict = "right" if right else "wrong"
    raw = f'<p class="soft">The recogniser wrote: <i>{html.escape(heard)}</i></p>' if heard else ""
    return (
        f'<div class="sample {"ok" if right else "wrong"}"><span class="mark">{verdict}</span>'
        f'<div class="five">{cells}</div>{raw}</div>'
    )


def _transcript(sample: Mapping[str, Any], language: str) -> tuple[str, str, str]:
    """What was heard of Echo; of a recording that was only to be transcribed, what was written of it."""
    text = sample["answer_text"] or ""
    if sample.get("answer_wav") or sample.get("cascade_text") is not None:
        return "What was heard of it", marked_words(text, sample.get("judged_text") or "", language), ""
    return "What was written of it", marked_words(sample["reference_text"] or "", text, language), ""


def _voice(title: str, text: str, heard: str | None, wav: bytes | None, language: str) -> tuple[str, str, str]:
    """A column that is also judged: its text, and below what was heard of it where that differs."""
    shown = html.escape(text)
    if heard is not None and any(missed != got for missed, got in word_edits(text, heard, language)):
        shown += f"<br><small>{marked_words(text, heard, language)}</small>"
    return title, shown, player(wav)
