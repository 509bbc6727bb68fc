"""The page: style, scripts, a comparison of several runs, and every run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from ceed_vla.errors import ConfigError, raised_as
from ceed_vla.outputs import MADE_BY
from ceed_vla.report import calibration, evaluation, ros, training, tuning
from ceed_vla.report.html import Markup, data, element, script
from ceed_vla.report.plots import Plot
from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown
from ceed_vla.report.tables import Cell, table

SHOW = {
    "eval": evaluation.show,
    "bench": evaluation.show,
    "calibrate": calibration.show,
    "tune": tuning.show,
    "train": training.show,
    "distill": training.show,
    "ros-demo": ros.show,
}
# The page loads nothing: scripts, styles, clips and images are in it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; media-src data:"
)


def page(runs: Sequence[Run]) -> str:
    """The page of runs, as HTML.

    Raises:
        ConfigError: A file of a run lacks what is shown, or plotly is not installed.
    """
    plots: list[Plot] = []
    shown = [(run, _shown(run)) for run in runs]
    parts = [_comparison(shown, plots)] if len(runs) > 1 else []
    parts += [_run(index, run, one, plots) for index, (run, one) in enumerate(shown)]
    title = ", ".join(run.name for run in runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="generator", content=MADE_BY),
        element("title", f"{title} - ceed-vla"),
        Markup(f"<style>{_asset('page.css')}</style>"),
    )
    body = element(
        "body",
        element("main", *parts),
        element("footer", MADE_BY),
        data("plots", [plot.specification() for plot in plots]),
        script(_plotly()),
        script(_asset("page.js")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _shown(run: Run) -> Shown:
    """What is shown of a run."""
    what = f"{run.folder} lacks what a page of {run.kind} shows"
    with raised_as(ConfigError, what, "run the command again, or restore its files"):
        return SHOW[run.kind](run)


def _comparison(shown: Sequence[tuple[Run, Shown]], plots: list[Plot]) -> Markup:
    """The verdicts of all runs, and the decoders of all evaluations in one table and figure."""
    rows: list[list[str | Cell]] = [[run.name, run.kind, one.verdict] for run, one in shown]
    parts: list[Markup | Plot] = [table(("run", "command", "verdict"), rows, "Runs")]
    evaluations = [run for run, _ in shown if run.kind in ("eval", "bench")]
    if len(evaluations) > 1:
        parts += [evaluation.decoder_table(evaluations), evaluation.pareto(evaluations)]
        if delays := evaluation.delay_plot(evaluations):
            parts.append(delays)
    heading = element("h1", f"{len(shown)} runs")
    return element("section", heading, *_parts(Section("", parts), plots), id="comparison")


def _run(index: int, run: Run, shown: Shown, plots: list[Plot]) -> Markup:
    """A run: the verdict first."""
    parts: list[Markup] = [
        element("h1", f"{run.kind}: {run.name}"),
        element("p", shown.verdict, class_="verdict"),
    ]
    for section in shown.sections:
        kind = (
            "clips"
            if any(isinstance(p, str) and p.startswith("<figure") for p in section.parts)
            else None
        )
        parts += [
            element("h2", section.title),
            element("div", *_parts(section, plots), class_=kind),
        ]
    return element("section", *parts, id=f"run-{index}")


def _parts(section: Section, plots: list[Plot]) -> list[Markup]:
    """The elements of a section; a figure is an empty box until the script draws into it."""
    found = []
    for part in section.parts:
        if isinstance(part, Plot):
            box = element("div", id=f"plot-{len(plots)}", role="img", aria_label=part.title)
            found.append(element("figure", element("figcaption", part.title), box, class_="plot"))
            plots.append(part)
        else:
            found.append(part)
    return found


def _asset(name: str) -> str:
    return (files("ceed_vla.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The source of plotly.js, from the installed wheel."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        raise ConfigError("The page needs plotly: pip install plotly.")
    return (Path(spec.origin).parent / "package_data/plotly.min.js").read_text(encoding="utf-8")
