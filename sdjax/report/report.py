"""`sdjax report`: run folders to one HTML page, and its figures as SVG and PNG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.report import figures, page, rollouts
from sdjax.report.figures import Plot
from sdjax.report.groups import Band, Group, accuracy_at, band, closing, grouped_runs, last_values
from sdjax.report.microscope import open_run, score_rollouts
from sdjax.report.runs import ReportError, Run, read_run

SEEDS = "Line: mean of the seeds; band: lowest to highest."
WILSON = "Band of a single seed: 95 % interval over problems."

MAIN = {
    "reward": "Reward",
    "length": "Length, tokens",
    "epistemic_per_thousand": "Epistemic words per 1,000 tokens",
    "finished": "Share ended by itself",
}
"""Logged numbers with a figure of their own; the others stand under "everything else"."""

SHARES = ("reward", "finished", "trained")
"""Numbers that lie between 0 and 1 if all values of a report do."""

TABLE = (
    ("reward", "reward"),
    ("length", "tokens"),
    ("epistemic_per_thousand", "hedges per 1,000"),
    ("finished", "ended by itself"),
)
"""Closing numbers of the comparison."""


def report(
    runs: tuple[str, ...],
    /,
    *,
    out: str = "report.html",
    microscope: bool = False,
    model: str = "",
    teacher: str = "",
    rollouts: int = 200,
) -> str:
    """Writes a page about run folders, and its figures beside it in `<page's name>-figures/`; returns what was written.

    Args:
      runs: run folders; those that differ in their seed alone are drawn as one, with a band.
      out: the page.
      microscope: score recorded rollouts with the saved parameters, for what the teacher thinks of each token.
      model: where architecture and tokenizer are read from, if a run has no model/ and does not say.
      teacher: a model that stands for teachers that are not saved with a run.
      rollouts: at most about this many recorded rollouts in the page, over all runs.
    """
    if not runs:
        raise ReportError("name at least one run folder: sdjax report runs/mine")
    read = [read_run(folder) for folder in dict.fromkeys(runs)]
    groups = grouped_runs(read)
    data = microscope_data(groups, microscope, model, teacher, rollouts)
    return written(Path(out), groups, plots(groups), data)


def written(target: Path, groups: Sequence[Group], drawings: Sequence[Plot], data: Mapping[str, Any] | None) -> str:
    """Writes the figures and the page."""
    beside, order = target.with_name(target.stem + "-figures"), [group.label for group in groups]
    try:
        beside.mkdir(parents=True, exist_ok=True)
        markup = []
        for plot in drawings:
            drawing = figures.drawn(plot, order)
            figures.write_figure(beside, plot, drawing)
            markup.append(page.figure(plot, figures.for_page(drawing, plot.name)))
        text = page.page(title(groups), body(groups, drawings, markup, data), data)
        target.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ReportError(f"{target} cannot be written ({error.strerror}): name another file with --out") from error
    return f"{target} ({target.stat().st_size / 1e6:.1f} MB), figures in {beside}"


# ---- figures --------------------------------------------------------------------------------------------------------


def plots(groups: Sequence[Group]) -> list[Plot]:
    """All figures: accuracy, the main numbers, pass@k and accuracy by cap where there are any, then everything else."""
    names = lambda of: sorted({name for g in groups for run in g.runs for name in of(run)})
    evaluated = [name for name in names(lambda run: run.evaluations) if name not in ("accuracy", "low", "high")]
    found = [accuracy_plot(groups)]
    found += [curve_plot(groups, name, text) for name, text in MAIN.items()]
    for prefix in NUMBERED:
        ends = {name.removeprefix(prefix).lstrip("0123456789") for name in evaluated if name.startswith(prefix)}
        found += [values_plot(groups, prefix, end) for end in sorted(ends)]
    found += [curve_plot(groups, name, name) for name in names(lambda run: run.steps) if name not in MAIN]
    found += [evaluation_plot(groups, name) for name in evaluated if not name.startswith(tuple(NUMBERED))]
    return [plot for plot in found if plot]


NUMBERED = {
    "pass@": ("pass-at-k", "Solved by one of k samples (pass@k)", "k", True),
    "accuracy@": ("accuracy-by-cap", "Accuracy by generation cap", "most tokens of an answer", False),
}
"""Evaluations that carry a number in their name, `accuracy@64`, or `accuracy@64_in_domain` where there are several sets:
their figure's name, title, axis, and whether the numbers double."""


def said(end: str) -> str:
    """`_in_domain` as `, in domain`."""
    return f", {end.strip('_').replace('_', ' ')}" if end else ""


def accuracy_plot(groups: Sequence[Group]) -> Plot | None:
    """The figure of held-out accuracy; a single seed's band is its interval over problems."""
    bands = named({group.label: accuracy_band(group) for group in groups})
    sizes = {len(group.runs) > 1 for group in groups}
    caption = " ".join([*([SEEDS] if True in sizes else []), *([WILSON] if False in sizes else [])])
    return Plot("accuracy", "Held-out greedy accuracy", "step", bands, caption, True, True) if bands else None


def accuracy_band(group: Group) -> Band | None:
    """Held-out accuracy of a group's runs."""
    found = band([run.evaluations.get("accuracy", {}) for run in group.runs])
    ends = [band([run.evaluations.get(end, {}) for run in group.runs]) for end in ("low", "high")]
    if len(group.runs) > 1 or found is None or any(e is None or len(e.step) != len(found.step) for e in ends):
        return found
    return found._replace(low=ends[0].mean, high=ends[1].mean)


def named(bands: Mapping[str, Any]) -> dict[str, Any]:
    """Those that hold values."""
    return {label: some for label, some in bands.items() if some}


def curve_plot(groups: Sequence[Group], name: str, text: str) -> Plot | None:
    """The figure of a number that is logged in every step."""
    curves = lambda group: [run.steps.get(name, {}) for run in group.runs]
    bands = named({group.label: band(curves(group)) for group in groups})
    if not bands:
        return None
    windows = {some.window for some in bands.values()}
    caption = [SEEDS] if any(len(g.runs) > 1 for g in groups) else []
    caption += [f"Each point is the mean of {max(windows)} steps."] if max(windows) > 1 else []
    inside = name in SHARES and all(0 <= v <= 1 for g in groups for c in curves(g) for v in c.values())
    return Plot(file_name(name), text, "step", bands, " ".join(caption), inside)


def evaluation_plot(groups: Sequence[Group], name: str) -> Plot | None:
    """The figure of a number that is measured now and then."""
    curves = lambda group: [run.evaluations.get(name, {}) for run in group.runs]
    bands = named({group.label: band(curves(group)) for group in groups})
    caption = SEEDS if any(len(g.runs) > 1 for g in groups) else ""
    inside = all(0 <= v <= 1 for g in groups for c in curves(g) for v in c.values())
    text = f"Evaluated: {name.replace('_', ' ')}"
    return Plot(f"evaluated-{file_name(name)}", text, "step", bands, caption, inside, True) if bands else None


def values_plot(groups: Sequence[Group], prefix: str, end: str = "") -> Plot | None:
    """The figure of evaluations that carry a number in their name, from each run's last."""
    name, text, x, doubling = NUMBERED[prefix]
    bands = named({group.label: last_values(group, prefix, end) for group in groups})
    bands = {label: figures.as_band(values) for label, values in bands.items()}
    caption = "Last evaluation; bands: 95 % over seeds."
    title = text + said(end)
    return Plot(name + file_name(end), title, x, bands, caption, True, True, doubling) if bands else None


def file_name(name: str) -> str:
    """A logged number's name as a file's and an id's."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)


# ---- words and tables -----------------------------------------------------------------------------------------------


def title(groups: Sequence[Group]) -> str:
    """What the page is about."""
    said = [group.label for group in groups]
    return f"{', '.join(said[:3])}{f' and {len(said) - 3} more' if len(said) > 3 else ''}: training report"


def body(groups: Sequence[Group], drawings: Sequence[Plot], markup: Sequence[str], data: Mapping | None) -> str:
    """Everything the page shows."""
    first = [m for plot, m in zip(drawings, markup, strict=True) if is_main(plot)]
    rest = [m for plot, m in zip(drawings, markup, strict=True) if not is_main(plot)]
    runs = sum(len(group.runs) for group in groups)
    grid = lambda some: f'<div class="figures">{"".join(some)}</div>'
    more = f"<details><summary>Everything else that was logged ({len(rest)} figures)</summary>{grid(rest)}</details>"
    alarmed = any(run.alarms for group in groups for run in group.runs)
    links = [
        ("results", "Results"),
        ("curves", "Curves"),
        *([("alarms", "Alarms")] if alarmed else []),
        ("runs", "Runs"),
        *([("tokens-part", "Tokens")] if data else []),
    ]
    return "\n".join(
        [
            f"<header><h1>{html.escape(title(groups))}</h1>",
            f'<p class="lead">{count(runs, "run")} in {count(len(groups), "group")}; those that differ in their seed'
            + " alone are one group.</p>",
            "<nav>" + "".join(f'<a href="#{name}">{text}</a>' for name, text in links) + "</nav></header>",
            "<main>",
            page.section("results", "Results", comparison(groups)),
            page.section("curves", "Curves", grid(first), more if rest else ""),
            page.section("alarms", "Alarms", alarm_table(groups)) if alarmed else "",
            page.section("runs", "Runs", run_table(groups), argument_table(groups)),
            page.section("tokens-part", "Token microscope", page.part("microscope.html")) if data else "",
            "</main>",
        ]
    )


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_main(plot: Plot) -> bool:
    """Whether a figure stands in the page's first grid."""
    measured = ("pass-at-k", "accuracy-by-cap", "evaluated-accuracy")
    return plot.name in ("accuracy", *map(file_name, MAIN)) or plot.name.startswith(measured)


def labelled(groups: Sequence[Group]) -> list[str]:
    """Markup of the groups' names, each after its line in the figures."""
    return [page.swatch(i, len(figures.COLOURS)) + html.escape(group.label) for i, group in enumerate(groups)]


def comparison(groups: Sequence[Group]) -> str:
    """Groups beside one another, with 95 % intervals."""
    columns = ["", "seeds", "accuracy before", "accuracy after", *(text for _, text in TABLE)]
    rows = [
        [
            name,
            str(len(group.runs)),
            page.interval(accuracy_at(group, min), percent=True),
            page.interval(accuracy_at(group, max), percent=True),
            *(page.interval(closing(group, number)) for number, _ in TABLE),
        ]
        for name, group in zip(labelled(groups), groups, strict=True)
    ]
    caption = (
        "Mean [95 % interval]. Accuracy is greedy, on held-out problems, at each run’s first and last evaluation; its "
        "interval is the wider of that over seeds (Student’s t) and that over problems (Wilson). Other columns: mean of "
        "the last tenth of the steps, interval over seeds; no interval for a single seed."
    )
    return page.table(columns, rows, caption)


def run_table(groups: Sequence[Group]) -> str:
    """Every run with its folder."""
    rows = [
        [
            name,
            html.escape(str(run.arguments.get("seed", "–"))),
            str(run.last),
            html.escape(str(run.folder)),
            state(run),
        ]
        for name, group in zip(labelled(groups), groups, strict=True)
        for run in group.runs
    ]
    return page.table(("group", "seed", "steps", "folder", ""), rows)


def alarm_table(groups: Sequence[Group]) -> str:
    """What the sentinels of all runs noticed, in order."""
    rows = [
        [html.escape(str(run.folder)), str(alarm["step"]), html.escape(alarm["kind"]), html.escape(alarm["says"])]
        for group in groups
        for run in group.runs
        for alarm in run.alarms
    ]
    return page.table(("run", "step", "kind", "what was noticed"), rows)


def state(run: Run) -> str:
    """Whether a run is over."""
    asked = run.arguments.get("steps")
    return f"of {asked}: not finished" if isinstance(asked, int) and run.last < asked else "finished"


def argument_table(groups: Sequence[Group]) -> str:
    """All arguments of all groups, those that differ first."""
    names = {name for group in groups for name in group.runs[0].arguments if name != "seed"}
    said = {name: [str(group.runs[0].arguments.get(name, "–")) for group in groups] for name in sorted(names)}
    order = sorted(said, key=lambda name: (len({*said[name]}) == 1, name))
    differing = sum(len({*said[name]}) > 1 for name in order)
    rows = [[html.escape(name), *(html.escape(value) for value in said[name])] for name in order]
    text = f"All arguments{f' ({differing} of them differ and come first)' if differing else ''}"
    return f"<details><summary>{text}</summary>{page.table(['', *labelled(groups)], rows)}</details>"


# ---- rollouts -------------------------------------------------------------------------------------------------------


def microscope_data(groups: Sequence[Group], score: bool, model: str, teacher: str, most: int) -> dict | None:
    """What the microscope shows; `None` where no run has recorded a rollout."""
    told = {run_label(group, run): run for group in groups for run in group.runs if run.rollouts}
    if not told:
        if score:
            raise ReportError("none of the runs has recorded rollouts (rollouts.jsonl): the microscope needs them")
        return None
    shown = {label: rollouts.chosen(run.rollouts, max(1, most // len(told))) for label, run in told.items()}
    found: dict[str, tuple] = {label: (lines, None, None) for label, lines in shown.items()}
    after: dict[str, int] = {}
    for label, run in told.items() if score else ():
        reader = open_run(run, model, teacher)  # one at a time: each holds a whole model
        found[label] = (shown[label], score_rollouts(reader, shown[label]), reader.tokenizer)
        after[label] = reader.step
    return rollouts.page_data(found, after)


def run_label(group: Group, run: Run) -> str:
    """A run's name in the microscope."""
    number = f" #{group.runs.index(run) + 1}" if len(group.runs) > 1 else ""
    return f"{group.label}, seed {run.arguments.get('seed', '?')}{number}"
