"""Writes self-contained HTML pages, with figures inside, in the look that all pages of this project share."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--good:#1a7f37;--bad:#b35900}
body{font:16px/1.55 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:1px solid var(--line)}h3{margin-bottom:.3rem}
table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{padding:.35rem .7rem;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
td small,.soft{opacity:.75}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{font-weight:600}dd{margin:0}
.curve{max-width:100%;height:auto;background:#fff;border-radius:6px}
.sample{border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:.8rem 0}
.sample p{margin:.2rem 0}.ok{border-left:5px solid var(--good)}.wrong{border-left:5px solid var(--bad)}
.mark{float:right;font-weight:600}.ok .mark{color:var(--good)}.wrong .mark{color:var(--bad)}
audio{height:2.2rem;width:100%;max-width:26rem;display:block}
del{color:var(--bad)}ins{color:var(--bad);font-weight:600;text-decoration:none}
.five{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem}.five h4{margin:.2rem 0}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write one HTML file of `parts`, empty ones left out, in the look of all pages of this project."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}</style></head>\n<body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def player(wav: bytes | None) -> str:
    """A player of the bytes of a WAV file, which the page then holds; nothing for none."""
    if not wav:
        return ""
    return f'<audio controls preload="none" src="data:audio/wav;base64,{base64.b64encode(wav).decode()}"></audio>'


def as_svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element of the page, the same text for the same curves; nothing in it is loaded.

    Args:
        figure: what to draw.
        label: what it shows, for those who do not see it. It also keeps the names in it apart from other figures'.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    # Without the XML head, whose document type names an address.
    return text[text.index("<svg") :].replace(
        "<svg ", f'<svg class="curve" role="img" aria-label="{html.escape(label)}" ', 1
    )


def as_png(figure: Figure) -> str:
    """A figure as a PNG in base64, the same bytes for the same curves."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
