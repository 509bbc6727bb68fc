"""Runs of ``ros-demo``."""

from __future__ import annotations

from typing import Any

from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown, settings
from ceed_vla.report.tables import Cell, number, table


def show(run: Run) -> Shown:
    """What is shown of a demonstration through ROS 2."""
    report = run.values
    details = report.get("details", {})
    low, high = (100 * end for end in report["success_ci95"])
    verdict = (
        f"{100 * report['success_rate']:.1f} % of {report['episodes']} episodes solved "
        f"[{low:.0f}, {high:.0f}] at {report['command_rate_hz']:.2f} commands a second; "
        f"{100 * report['missed_ticks_fraction']:.3g} % of the ticks were missed."
    )
    rows: list[list[str | Cell]] = []
    for name, value in report.items():
        if name == "details":
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, one in parts:
            shown: Any = number(one, "{:.4g}") if isinstance(one, int | float) else str(one)
            rows.append([f"{name} {part}".strip(), shown])
    sections = [Section("Measures", [table(("measure", "value"), rows, "Measures")])]
    for name, title in (
        ("holds_by_reason", "Holds by reason"),
        ("clamps_by_kind", "Clamps by kind"),
    ):
        counts = details.get(name)
        if isinstance(counts, dict) and counts:
            found: list[list[str | Cell]] = [[str(k), number(v, "{:g}")] for k, v in counts.items()]
            sections.append(Section(title, [table(("reason", "count"), found, title)]))
    options = details.get("config")
    conditions = options if isinstance(options, dict) else {}
    sections.append(Section("Settings", [settings(conditions, report)]))
    return Shown(verdict, sections)
