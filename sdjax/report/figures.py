"""Figures of groups of runs, for papers (SVG and PNG) and for the page (SVG that follows its colours)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdjax.report.groups import Band, Interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9", "#8a4fbf", "#5a5a5a")
"""After Okabe and Ito 2008: told apart by colour-blind readers.  The page lightens them on a dark ground."""

DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

INK, FAINT = "#1b1f24", "#c9ced6"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a label with a dollar sign is no formula
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sdjax",
    "path.simplify_threshold": 0.5,
}


class Plot(NamedTuple):
    """What one figure shows: bands over steps, or values with intervals over `x`, by group."""

    name: str
    title: str
    x: str
    bands: Mapping[str, Band]
    caption: str = ""
    share: bool = False
    """Whether the values lie between 0 and 1."""
    marked: bool = False
    """Whether each point is a measurement of its own and gets a mark."""
    doubling: bool = False
    """Whether `x` takes few values, each about twice the one before."""


def as_band(values: Mapping[int, Interval]) -> Band:
    """Values with intervals as a band; an end that is not known is the value itself."""
    mean = [v.mean for v in values.values()]
    ends = [
        [v.mean if end is None else end for v, end in zip(values.values(), some, strict=True)]
        for some in zip(*[(v.low, v.high) for v in values.values()], strict=True)
    ]
    return Band(np.array(list(values), float), np.array(mean), np.array(ends[0]), np.array(ends[1]))


def drawn(plot: Plot, order: Sequence[str], size: tuple[float, float] = (5.4, 3.1)) -> Figure:
    """The figure.  `order` names all groups of the report, so that each looks the same everywhere."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for label, band in plot.bands.items():
            number = order.index(label)
            colour, known = COLOURS[number % len(COLOURS)], np.isfinite(band.mean)
            axes.fill_between(band.step, band.low, band.high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(
                band.step[known],
                band.mean[known],
                color=colour,
                linewidth=1.7,
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4.5 if plot.marked or known.sum() == 1 else 4,
                markevery=1
                if plot.marked
                else (max(int(known.sum()) // 12, number % 5), max(int(known.sum()) // 6, 1)),
                label=label,
            )
        axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(plot.x)
        if plot.doubling:
            axes.set_xscale("log", base=2)
            values = sorted({int(x) for band in plot.bands.values() for x in band.step})
            axes.set_xticks(values, [str(x) for x in values])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(length=0)
        if plot.share:
            axes.set_ylim(-0.02, 1.02)
        elif all(np.nanmax(np.abs(band.high)) == 0 for band in plot.bands.values()):
            axes.set_ylim(0, 1)
        if len(order) > 1:
            axes.legend(fontsize=8.5, handlelength=3.2, loc="best")
        return figure


def saved(figure: Figure, form: str) -> bytes:
    """A figure as a file of a form, the same bytes each time."""
    target = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a label in a script this font lacks
        figure.savefig(target, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    return target.getvalue()


def write_figure(folder: Path, plot: Plot, figure: Figure) -> None:
    """Writes `<name>.svg` and `<name>.png`."""
    for form in ("svg", "png"):
        (folder / f"{plot.name}.{form}").write_bytes(saved(figure, form))


def for_page(figure: Figure, name: str) -> str:
    """A figure as SVG to stand in a page: colours from its style sheet, ids of its own, no size and no metadata."""
    svg = saved(figure, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" (.*?)width="[^"]*"',
        r"<svg \1\2\3",
        svg,
        count=1,
    )
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    svg = svg.replace("#ffffff", "none")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
