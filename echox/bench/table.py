"""Formats the rows of a benchmark as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        value, unit: the number.
        ratio: value over that of `against`, measured in the same run; None stands alone.
        aim: what the value or the ratio should reach; empty for a row that is only there to compare with.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""
    aim: str = ""


def table(rows: Sequence[Row]) -> str:
    """Markdown, so that it can be kept as it is."""
    lines = ["| measurement | value | ratio | aim |", "|---|---:|---:|---:|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} × {row.against}"
        lines.append(f"| {row.name} | {_number(row.value)} {row.unit} | {ratio} | {row.aim} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
