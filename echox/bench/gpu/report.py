"""Formats the results of `echox bench gpu` as Markdown: what holds, steps, what each technique gains, the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from echox.bench.gpu.results import Results
from echox.bench.teacher import TeacherRow
from echox.bench.teacher import table as teacher_table

Cell = Mapping[str, Any]


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("ms", "ms", _number),
    ("predicted ms", "predicted_ms", _number),
    ("samples/s", "samples_s", _number),
    ("LLM tokens/s", "tokens_s", _number),
    ("audio-s/s", "audio_s_s", _number),
    ("TFLOP/s", "tflops", _number),
    ("MFU, sheet", "mfu_sheet", _share),
    ("MFU, ceiling", "mfu_ceiling", _share),
    ("peak GiB", "peak_gib", _number),
    ("plan GiB", "plan_gib", _number),
    ("teacher", "teacher_share", _share),
    ("host gap", "host_gap", _share),
    ("kernels", "kernels", _number),
    ("padding", "padding_share", _share),
)
"""Heading, field of `StepRow`, format."""


def report(results: Results) -> str:
    """The whole table."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    about = results.about
    memory = about.get("memory_gib")
    yield f"# One device: {about.get('device', 'not yet known')}" + (f", {memory:.0f} GiB" if memory else "")
    yield ""
    yield (
        f"{about.get('dtype', '')}, torch {about.get('torch', '')}, transformers {about.get('transformers', '')}, "
        f"Python {about.get('python', '')}. Random weights at true shapes, lengths imposed. {about.get('note', '')}"
    )
    cells = results.cells
    ceilings = cells.get("ceilings", {}).get("values")
    if ceilings:
        yield (
            f"A large matrix product reaches {_number(ceilings['matmul_tflops'])} TFLOP/s, a copy "
            f"{_number(ceilings['copy_tb_s'])} TB/s, bytes read and written."
        )
    checks = {name: cell for name, cell in cells.items() if name.startswith("check: ")}
    yield from _checks(checks)
    steps = {name: cell for name, cell in cells.items() if _is_step(cell)}
    yield from _steps({name: cell for name, cell in steps.items() if "," not in name})
    yield from _ladder(steps)
    for name, cell in cells.items():
        if name.endswith(" teacher") and cell["status"] == "done":
            yield ""
            yield teacher_table(name, [TeacherRow(**row) for row in cell["values"]])
    yield from _missing(cells)


def _is_step(cell: Cell) -> bool:
    return cell["status"] == "done" and isinstance(cell["values"], dict) and "tokens_s" in cell["values"]


def _checks(checks: Mapping[str, Cell]) -> Iterator[str]:
    if not checks:
        return
    yield from ("", "| check | holds | found |", "|---|---|---|")
    for name, cell in checks.items():
        held, title = cell["status"] == "done", name.removeprefix("check: ")
        yield f"| {title} | {'yes' if held else 'NO'} | {cell['values'] if held else cell['why']} |"


def _steps(steps: Mapping[str, Cell]) -> Iterator[str]:
    if not steps:
        return
    yield from ("", f"| step | {' | '.join(heading for heading, _, _ in COLUMNS)} |")
    yield f"|---|{'---:|' * len(COLUMNS)}"
    for name, cell in steps.items():
        shown = (form(cell["values"][field]) for _, field, form in COLUMNS)
        yield f"| {name} | {' | '.join(shown)} |"


def _ladder(steps: Mapping[str, Cell]) -> Iterator[str]:
    if not any("," in name for name in steps):
        return
    yield from ("", "| without | ms | times the step | samples/s | peak GiB | kernels | host gap |")
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, cell in steps.items():
        whole, _, without = name.partition(", ")
        if without and whole in steps:
            row, base = cell["values"], steps[whole]["values"]
            yield (
                f"| {name} | {_number(row['ms'])} | {row['ms'] / base['ms']:.2f} | {_number(row['samples_s'])} "
                f"| {_number(row['peak_gib'])} | {_number(row['kernels'])} | {_share(row['host_gap'])} |"
            )


def _missing(cells: Mapping[str, Cell]) -> Iterator[str]:
    missing: Sequence[tuple[str, Cell]] = [
        (name, cell) for name, cell in cells.items() if cell["status"] != "done" and not name.startswith("check: ")
    ]
    if missing:
        yield from ("", "| not measured | why |", "|---|---|")
        for name, cell in missing:
            why = str(cell["why"]).replace("|", "/")
            yield f"| {name} | {cell['status']}: {why} |"
