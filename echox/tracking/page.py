"""Writes the page of a comparison: one HTML file with overlaid curves, outcomes and what was set differently."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echox.html import as_png, write_page
from echox.tracking.compare import Outcome, common, differences, outcomes
from echox.tracking.curves import AXES, Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ABOUT_AXES = (
    "Runs of different scale take a different time for a step and may see other batches, so each loss is drawn over "
    "everything it can be compared by: optimizer steps, hours of training (pauses between attempts left out), tokens "
    "and audio seen. Steps that a later attempt did again are drawn once. Thin lines are single steps, thick lines "
    "their running mean, dashed lines validation."
)
_PERF = {
    "perf/tokens_per_s_per_gpu": "tokens a second and GPU",
    "perf/audio_s_per_s": "seconds of audio a second",
    "perf/mfu": "useful FLOP/s, share of the GPU's data sheet",
    "perf/step_ms": "milliseconds a step",
    "perf/data_wait_share": "share of the time spent waiting for data",
    "perf/padding_share": "share of positions that are padding",
    "perf/teacher_share": "share of the time in the teacher's decode",
    "perf/peak_gib": "peak memory of a worker, GiB",
}
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def write_comparison(path: Path, runs: Sequence[Curves]) -> Path:
    """Write the page of a comparison, which needs nothing beside it; returns the path."""
    names = " · ".join(
        f'<b style="color:{colour_of(index)}">■</b> {html.escape(run.name)}' for index, run in enumerate(runs)
    )
    parts = [
        "<h1>EchoX runs compared</h1>",
        f"<p>{names}</p>",
        _losses(runs),
        _outcomes(runs),
        _speed(runs),
        _parameters(runs),
    ]
    return write_page(path, "EchoX runs compared", parts)


def colour_of(index: int) -> str:
    """Colour of a run, the same in all pictures."""
    return _COLOURS[index % len(_COLOURS)]


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Running mean over about `share` of the values, as many after as before, so that a falling curve is not late."""
    most = int(len(values) * share / 2)
    half = [min(most, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - h : i + h + 1]) / (2 * h + 1) for i, h in enumerate(half)]


def _losses(runs: Sequence[Curves]) -> str:
    shared = [name for name in common(runs, "loss/") if any(run.axis("step", name) for run in runs)]
    if not shared:
        return '<h2>Losses</h2><p class="soft">The runs have no loss in common.</p>'
    pictures = "".join(f"<h3>{html.escape(name)}</h3>{_loss(runs, name)}" for name in shared)
    return f"<h2>Losses</h2><p>{_ABOUT_AXES}</p>{pictures}"


def _loss(runs: Sequence[Curves], name: str) -> str:
    from matplotlib.figure import Figure

    axes = [axis for axis in AXES if any(run.axis(axis, name) for run in runs)]
    figure = Figure(figsize=(10, 2.9 * ((len(axes) + 1) // 2)), dpi=110, layout="constrained")
    grid = figure.subplots((len(axes) + 1) // 2, 2, squeeze=False, sharey=True).flat
    for plot, axis in zip(grid, axes, strict=False):
        for index, run in enumerate(runs):
            _curve(plot, run, axis, name, colour_of(index))
            _curve(plot, run, axis, f"valid/{name}", colour_of(index), valid=True)
        plot.set_xlabel(AXES[axis])
        plot.set_ylabel("nats a token")
    for plot in list(grid)[len(axes) :]:
        plot.set_visible(False)
    return _picture(as_png(figure), f"{name} of the runs")


def _curve(axes: Axes, run: Curves, axis: str, name: str, colour: str, *, valid: bool = False) -> None:
    points = run.axis(axis, name)
    axes.grid(alpha=0.3)
    if not points:
        return
    positions, values = [plot for plot, _ in points], [value for _, value in points]
    if valid:
        axes.plot(positions, values, color=colour, lw=1.2, ls="--", marker="o", ms=3)
        return
    axes.plot(positions, values, color=colour, lw=0.6, alpha=0.35)
    axes.plot(positions, smooth(values), color=colour, lw=1.6)


def _speed(runs: Sequence[Curves]) -> str:
    from matplotlib.figure import Figure

    shown = [name for name in _PERF if any(name in run.points for run in runs)]
    if not shown:
        return ""
    rows = (len(shown) + 1) // 2
    figure = Figure(figsize=(10, 2.6 * rows), dpi=110, layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for plot, name in zip(grid, shown, strict=False):
        for index, run in enumerate(runs):
            points = run.axis("step", name)
            plot.plot([x for x, _ in points], [y for _, y in points], color=colour_of(index), lw=1.2)
        plot.set_title(_PERF[name], fontsize=10)
        plot.set_xlabel(AXES["step"])
        plot.set_ylim(bottom=0)
        plot.grid(alpha=0.3)
    for plot in grid[len(shown) :]:
        plot.set_visible(False)
    return f"<h2>Speed and memory</h2>{_picture(as_png(figure), 'speed and memory of the runs')}"


def _outcomes(runs: Sequence[Curves]) -> str:
    rows = []
    for line in outcomes(runs):
        best = line.best()
        cells = "".join(
            f"<td>{'<b>' if index == best else ''}{_number(value)}{'</b>' if index == best else ''}</td>"
            for index, value in enumerate(line.values)
        )
        rows.append(f"<tr><td>{html.escape(line.name)} <small>{line.kind}</small></td>{cells}</tr>")
    return (
        "<h2>Outcomes</h2><p>The better value is bold where one is better. A final loss is the mean of the last five "
        f"values, rates are medians.</p><table>{_head('metric', runs)}{''.join(rows)}</table>"
    )


def _parameters(runs: Sequence[Curves]) -> str:
    found = differences(runs)
    if not found:
        return "<h2>Parameters</h2><p>All are the same.</p>"
    parts = []
    for section, keys in found.items():
        rows = "".join(f"<tr><td>{html.escape(key)}</td>{_values(values)}</tr>" for key, values in keys.items())
        parts.append(f"<h3>{html.escape(section)}</h3><table>{_head('parameter', runs)}{rows}</table>")
    return f"<h2>Parameters that differ</h2>{''.join(parts)}"


def _values(values: Sequence[str | None]) -> str:
    return "".join(f"<td>{'–' if value is None else html.escape(value)}</td>" for value in values)


def _head(first: str, runs: Sequence[Curves]) -> str:
    return f"<tr><th>{first}</th>{''.join(f'<th>{html.escape(run.name)}</th>' for run in runs)}</tr>"


def _picture(png: str, alt: str) -> str:
    return f'<img class="curve" alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def as_table(runs: Sequence[Curves]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of the two tables of the command: parameters that differ, and outcomes."""
    parameters = [
        (key, *("–" if value is None else value for value in values))
        for keys in differences(runs).values()
        for key, values in keys.items()
    ]
    lines: Sequence[Outcome] = outcomes(runs)
    return parameters, [(f"{line.name} {line.kind}", *map(_number, line.values)) for line in lines]


def distinct_names(runs: Mapping[str, str]) -> list[str]:
    """Names to tell runs apart: the run's own, with the head of its id where two share one. Ids to names."""
    names = list(runs.values())
    return [name if names.count(name) == 1 else f"{name} ({run_id[:8]})" for run_id, name in runs.items()]
