"""Runs of ``tune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.report.plots import PALETTE, Plot, axis, label
from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown, settings
from ceed_vla.report.tables import Cell, number, percent, table

COLUMNS = ("budget [ms]", "plan", "executed steps", "p50 [ms]", "success [95 %]", "by hand")


def show(run: Run) -> Shown:
    """What is shown of a search."""
    report = run.values
    plans = report["plans"]
    rows: list[list[str | Cell]] = [
        [
            number(plan["budget_ms"], "{:g}"),
            _name(plan),
            number(plan.get("executed_steps"), "{:g}"),
            number(plan.get("p50_ms"), "{:.1f}"),
            percent(plan) if plan.get("episodes") else Cell("-"),
            _name(plan["by_hand"]) if plan.get("by_hand") else "-",
        ]
        for plan in plans
    ]
    trials = [trial for trial in report.get("trials", []) if trial.get("success_rate") is not None]
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "tried",
            "x": [trial["p50_ms"] for trial in trials],
            "y": [100 * trial["success_rate"] for trial in trials],
            "text": [label(_name(trial)) for trial in trials],
            "marker": {"size": 7, "color": PALETTE[-1]},
            "hovertemplate": "%{text}: %{y:.1f} %, %{x:.1f} ms<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": "chosen",
            "x": [plan["p50_ms"] for plan in plans if plan.get("episodes")],
            "y": [100 * plan["success_rate"] for plan in plans if plan.get("episodes")],
            "text": [label(_name(plan)) for plan in plans if plan.get("episodes")],
            "textposition": "top center",
            "marker": {"size": 11, "color": PALETTE[1]},
        },
    ]
    layout = {
        "xaxis": axis("latency of a chunk, p50 [ms]"),
        "yaxis": axis("success [%]"),
        "showlegend": True,
    }
    found = [plan for plan in plans if plan.get("episodes")]
    best = "; ".join(f"{plan['budget_ms']:g} ms: {_name(plan)}" for plan in found)
    verdict = f"The best plan of each budget on fresh seeds: {best}." if found else "No plan fits."
    rejected = report["rejected"]  # by budget; one number in files of version 0.2.0
    rejected = sum(rejected.values()) if isinstance(rejected, dict) else rejected
    conditions = {
        "policy": report["policy"]["path"],
        "engine": report["engine"],
        "floor": f"{report['floor_ms']} ms",
        "plans": f"{report['tried']} tried, {rejected} too slow for their budget",
    }
    figure = Plot("Plans", traces, layout, height=420)
    return Shown(
        verdict,
        [
            Section("Plans", [table(COLUMNS, rows, "Plans by budget"), figure]),
            Section("Settings", [settings(conditions, report)]),
        ],
    )


def _name(plan: Mapping[str, Any]) -> str:
    """The decoding of a plan or trial."""
    return str(plan.get("decoding") or "none")
