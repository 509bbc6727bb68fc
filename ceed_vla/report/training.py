"""Runs of ``train`` and ``distill``: the curves of their logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ceed_vla.report.plots import PALETTE, Plot, axis, label
from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown, settings
from ceed_vla.report.tables import Cell, number, table

HIDDEN = ("step",)
MOST_POINTS = 2000  # of a curve


def show(run: Run) -> Shown:
    """What is shown of a training run."""
    lines: Sequence[Mapping[str, Any]] = run.values["lines"]
    names = dict.fromkeys(
        name
        for line in lines
        for name, value in line.items()
        if name not in HIDDEN and isinstance(value, int | float)
    )
    rows: list[list[str | Cell]] = []
    plots: list[Any] = []
    for index, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        values = [value for _, value in points]
        rows.append(
            [
                name,
                *(number(one, "{:.4g}") for one in (values[0], min(values))),
                number(max(values), "{:.4g}"),
                number(values[-1], "{:.4g}"),
            ]
        )
        thinned = points[:: max(1, len(points) // MOST_POINTS)]
        if thinned[-1] != points[-1]:
            thinned.append(points[-1])
        trace = {
            "type": "scatter",
            "mode": "lines" if len(points) > 12 else "lines+markers",
            "x": [step for step, _ in thinned],
            "y": [value for _, value in thinned],
            "line": {"color": PALETTE[index % len(PALETTE)]},
        }
        layout = {"xaxis": axis("step"), "yaxis": axis(label(name))}
        plots.append(Plot(name, [trace], layout, height=260))
    last = lines[-1]["step"] if lines else 0
    shown = ("validation_success", "early_exit_forwards", "teacher_agreement", "loss")
    ends = {name: value for line in lines for name, value in line.items()}
    said = [f"{name.replace('_', ' ')} {ends[name]:.4g}" for name in shown if name in ends]
    verdict = f"{last:,} steps; at the end {', '.join(said)}." if said else f"{last:,} steps."
    columns = ("measure", "first", "least", "most", "last")
    return Shown(
        verdict,
        [
            Section("Measures", [table(columns, rows, "Measures of the log")]),
            Section("Curves", plots),
            Section("Settings", [settings({"log": f"{len(lines):,} lines"}, run.values)]),
        ],
    )
