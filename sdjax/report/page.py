"""The page: text and figures put into one HTML file that reaches for nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from sdjax.report.figures import DASHES, Plot
from sdjax.report.groups import Band, Interval

escape = html.escape


def page(title: str, body: str, data: Mapping[str, Any] | None) -> str:
    """The whole page.  `body` is markup; `data` is what the microscope shows, `None` for a page without one.

    The policy forbids every request and every script but the one whose hash it names, so that markup that slipped
    through would still do nothing.
    """
    style, script = part("page.css"), part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    scripts = (
        f'<script type="application/json" id="data">{as_data(data)}</script>\n<script>{script}</script>' if data else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}
{scripts}
</body>
</html>
"""


def part(name: str) -> str:
    """A file of this folder: the page's look, its script, and the microscope before the script fills it."""
    return files("sdjax.report").joinpath(name).read_text(encoding="utf-8")


def as_data(value: Any) -> str:
    """JSON that may stand in a `script` element: ASCII, and no character that could end or open anything."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that can be linked to."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def figure(plot: Plot, svg: str) -> str:
    """A figure with its caption and, for those who cannot see it or want to know exactly, its numbers."""
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    summary = f'<summary>Numbers<span class="unseen"> of {escape(plot.title)}</span></summary>'
    return (
        f'<figure class="figure"><div role="img" aria-label="{escape(spoken(plot))}">{svg}</div>\n{caption}'
        f"<details>{summary}{band_table(plot)}</details></figure>"
    )


def spoken(plot: Plot) -> str:
    """A figure in one sentence."""
    ends = [f"{name} from {short(b.mean[0])} to {short(b.mean[-1])}" for name, b in plot.bands.items()]
    return f"{plot.title} over {plot.x}: {'; '.join(ends)}"


def band_table(plot: Plot, most: int = 12) -> str:
    """At most `most` rows of a figure's numbers."""
    rows = []
    for name, band in plot.bands.items():
        stride = max(1, -(-len(band.step) // most))
        rows += [[escape(name), f"{band.step[i]:g}", spread(band, i)] for i in range(0, len(band.step), stride)]
    return table((escape("run"), escape(plot.x), "mean [lowest, highest]"), rows)


def spread(band: Band, i: int) -> str:
    """One point of a band."""
    return f"{short(band.mean[i])} [{short(band.low[i])}, {short(band.high[i])}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of markup; the first cell of a row is its head.  It scrolls on its own where it is too wide."""
    head = "".join(f'<th scope="col">{c}</th>' for c in columns)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    said = f"<caption>{caption}</caption>" if caption else ""
    inner = f"<table>{said}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" tabindex="0" role="group" aria-label="table">{inner}</div>'


def short(value: float) -> str:
    """A number as people read it."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.4g}"


def interval(value: Interval | None, percent: bool = False) -> str:
    """A mean with its interval as markup; a dash for nothing."""
    if value is None:
        return '<span class="none">–</span>'
    say = (lambda x: f"{100 * x:.1f}") if percent else short
    mean = f"{say(value.mean)}{' %' if percent else ''}"
    ends = "" if value.low is None else f' <span class="ends">[{say(value.low)}, {say(value.high)}]</span>'
    return f"<b>{mean}</b>{ends}"


def swatch(number: int, colours: int) -> str:
    """The colour and dashes of a group, as a short line."""
    dash = {0: "", 1: "7 3", 2: "2 2", 3: "8 2 2 2"}[number % len(DASHES)]
    return (
        f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M1 4H27" fill="none" stroke-width="3" '
        f'stroke="var(--series-{number % colours})" stroke-dasharray="{dash}"/></svg>'
    )
