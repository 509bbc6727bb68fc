"""Runs of ``calibrate``."""

from __future__ import annotations

from ceed_vla.report.plots import PALETTE, Plot, axis, interval_bars, label
from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown, settings
from ceed_vla.report.tables import Cell, number, percent, table

COLUMNS = ("decoder", "risk [95 %]", "risk, at most", "forwards", "layers", "success [95 %]")


def show(run: Run) -> Shown:
    """What is shown of a calibration."""
    report = run.values
    rows = report["decoders"]
    chosen = report["chosen"]
    cells: list[list[str | Cell]] = []
    for name, row in rows.items():
        low, high = row["risk_ci95"]
        cells.append(
            [
                name,
                Cell(f"{row['risk']:.4f} [{low:.4f}, {high:.4f}]", row["risk"]),
                number(row["risk_upper95"], "{:.4f}"),
                number(row["forwards_mean"]),
                number(row["layers_mean"], "{:.1f}"),
                percent(row),
            ]
        )
    risks = [row["risk"] for row in rows.values()]
    trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": [row["layers_mean"] for row in rows.values()],
        "y": risks,
        "text": [label(name) for name in rows],
        "textposition": "top center",
        "error_y": interval_bars(risks, [row["risk_ci95"] for row in rows.values()]),
        "marker": {"size": 9, "color": PALETTE[1]},
    }
    layout = {"xaxis": axis("layers of a chunk"), "yaxis": axis("risk of an inexact action")}
    if chosen:
        said = "; ".join(f"{name} is {decoder}" for name, decoder in chosen.items())
        verdict = (
            f"With probability {1 - report['alpha']:g}, the risk stays below its bound: {said}."
        )
    else:
        verdict = f"The risk of {len(rows)} decoders, measured; nothing was chosen."
    seeds = report["seeds"]
    conditions = {
        "policy": report["policy"]["path"],
        "episodes": f"{seeds['count']} a decoder from seed {seeds['first']}",
        "an action is off": f"more than {100 * report['off']:g} % of its range",
        "executed steps": report["executed_steps"],
    }
    return Shown(
        verdict,
        [
            Section(
                "Risk", [table(COLUMNS, cells, "Risk by decoder"), Plot("Risk", [trace], layout)]
            ),
            Section("Settings", [settings(conditions, report)]),
        ],
    )
