"""Explains the scores of a held-out set and formats them, the same for a terminal, the report and a script's reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from echox.evaluate.normalization import error_rate_name
from echox.evaluate.quality import PARTS
from echox.evaluate.scores import ENTITY_AND_ANSWER


class Column(NamedTuple):
    """One score: key in a row, heading, and what it means in one line."""

    key: str
    label: str
    meaning: str


COLUMNS = (
    Column("n", "n", "Number of questions or recordings."),
    Column(
        "text_llm_acc",
        "text model",
        "The text model alone, which may read the question, gives an accepted answer.",
    ),
    Column("s2t_acc", "S2T", "The question is heard; an accepted answer stands in the text."),
    Column("s2s_acc", "S2S", "An independent speech recogniser hears an accepted answer in the speech."),
    Column("s2t_strict_acc", "S2T strict", "The text names the accepted answer and what the question is about."),
    Column(
        "s2s_strict_acc",
        "S2S strict",
        "The recogniser hears both, or exactly a text that has both; with its 95 % interval (Wilson).",
    ),
    Column(
        "cascade_acc",
        "cascade",
        "Strict, when the frozen T2C teacher speaks the same text: what speaking from hidden states is measured by.",
    ),
    Column(
        "copy_acc",
        "copy",
        "Strict, when the true units of the reference answer are spoken: the ceiling of vocoder and recogniser.",
    ),
    Column(
        "retention_paired",
        "retention",
        "Of the answers strictly right in text, the share strictly right in speech.",
    ),
    Column("exact", "exact", "What the recogniser hears is the model's text, word for word."),
    Column(
        "wer",
        "WER",
        "Word error rate of what is heard against the model's text; of recordings, of its transcript. Lower is better.",
    ),
    Column(
        "dnsmos",
        "DNSMOS",
        "How the speech sounds, whatever it says: the opinion of listeners, 1 to 5, that DNSMOS P.835 predicts (ovrl).",
    ),
)
RELATION_COLUMNS = (
    Column("n", "n", "Number of questions."),
    Column("s2t_strict", "S2T strict", ""),
    Column("s2s_strict", "S2S strict", ""),
    Column("cascade", "cascade", ""),
    Column("copy", "copy", ""),
)
QUALITY_COLUMNS = (
    Column("n", "n", "Clips that were rated."),
    Column("ovrl", "ovrl", "The whole (P.835)."),
    Column("sig", "sig", "The speech alone (P.835)."),
    Column("bak", "bak", "What is behind it (P.835); 5 is silence."),
    Column("p808", "p808", "The whole, by a network trained on P.808 listening tests."),
)
METRICS = (
    *(column.key for column in COLUMNS if column.key != "dnsmos"),
    "retention",
    "retention_cascade",
    "copy_n",
    "entity_n",
)
"""Scores of a set that are numbers."""


def in_language(columns: Sequence[Column], language: str) -> tuple[Column, ...]:
    """The columns of scores in a language, by Whisper's code: its error rate is of words, or of characters."""
    name = error_rate_name(language)

    def named(column: Column) -> Column:
        if column.key != "wer" or name == column.label:
            return column
        meaning = column.meaning.replace("Word error rate", "Character error rate, for it has no spaces between words,")
        return Column(column.key, name, meaning)

    return tuple(map(named, columns))


def metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a set's row by name; those of its own speech's quality are `dnsmos_ovrl` and so on."""
    own = (row.get("quality") or {}).get("echo") or {}
    found = {key: row.get(key) for key in METRICS} | {f"dnsmos_{part}": own.get(part) for part in (*PARTS, "n")}
    return {key: float(value) for key, value in found.items() if value is not None}


def cell(key: str, row: Mapping[str, Any]) -> str:
    """One score as people read it."""
    if key == "dnsmos":
        own = (row.get("quality") or {}).get("echo")
        return f"{own['ovrl']:.2f} of {own['n']}" if own else "–"
    value = row.get(key)
    if value is None:
        return "–"
    if key == "n":
        return str(value)
    if key in PARTS:
        return f"{value:.2f}"
    shown = f"{value:.2f}" if key.startswith("retention") else percent(value)
    if key == "s2s_strict_acc" and row.get("interval_95"):
        low, high = (100 * end for end in row["interval_95"])
        return f"{shown} [{low:.0f}–{high:.0f}]"
    if key.startswith("copy") and row.get("copy_n", row.get("n")) != row.get("n"):
        return f"{shown} of {row['copy_n']}"
    return shown


def note(row: Mapping[str, Any]) -> str:
    """What a reader must know of a set before its numbers: its role, and a strict rule that is not the usual one."""
    rule = row.get("strict_rule")
    unusual = "" if rule in (None, ENTITY_AND_ANSWER) else f"strict: {rule}"
    return ", ".join(filter(None, (row.get("role"), unusual)))


def percent(value: float) -> str:
    """A share between 0 and 1."""
    return f"{100 * float(value):.1f} %"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines whose columns stand below each other, filled up with spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)) for row in rows]
