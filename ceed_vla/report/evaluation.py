"""Runs of ``eval``, ``demo``, ``merge`` and ``bench``."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ceed_vla.errors import ConfigError
from ceed_vla.files import read_bytes
from ceed_vla.report.html import Markup, element
from ceed_vla.report.plots import PALETTE, Plot, axis, interval_bars, label, log_axis
from ceed_vla.report.runs import Run
from ceed_vla.report.shown import Section, Shown, settings
from ceed_vla.report.tables import Cell, number, percent, table

COLUMNS = (
    "decoder",
    "success [95 %]",
    "forwards",
    "p50 [ms]",
    "p95 [ms]",
    "p99 [ms]",
    "speed-up over AR",
    "tokens = AR",
)
PAIRED = ("decoder", "against", "points [95 %]", "only this : only the other", "sign test p")
LETTER = 0.019  # width of a letter in a plot on a phone, as a share of the axis
LINE = 5.0  # height of a line of text [percentage points]
MOST_CLIPS = 24 * 2**20  # of all clips of a run [bytes]; others are named


def show(run: Run) -> Shown:
    """What is shown of an evaluation."""
    report = run.values
    rows = report["decoders"]
    parts: list[Markup | Plot] = [decoder_table([run]), pareto([run]), success_plot(rows)]
    if plot := delay_plot([run]):
        parts.append(plot)
    sections = [Section("Decoders", parts)]
    if clips := list(_clips(run)):
        sections.append(Section("Clips: one episode with every decoder", clips))
    if tasks := _task_plot({n: row for n, row in rows.items() if not row["delay_steps"]}):
        sections.append(Section("Success by task", [tasks]))
    if pairs := list(_paired(rows)):
        title = "Differences on the same episodes, in percentage points"
        sections.append(Section("Paired comparison", [table(PAIRED, pairs, title)]))
    sections.append(Section("Settings", [_settings(report)]))
    return Shown(verdict(report), sections)


def verdict(report: Mapping[str, Any]) -> str:
    """The result in one or two sentences."""
    rows = report["decoders"]
    main = "ceed" if "ceed" in rows else next(iter(rows))
    entry = rows[main]
    partial = "" if report["complete"] else "Partial, the run was interrupted: "
    said = f"{partial}{main} solves {_solved(entry)}{_cost(entry)}."
    for reference in ("teacher_ar", "ar"):
        if reference in rows and reference != main:
            other = rows[reference]
            said += f" {reference} solves {_solved(other)}{_cost(other)}"
            pair = entry.get("paired", {}).get(reference)
            if pair:
                low, high = pair["ci95_points"]
                said += (
                    f"; on the same episodes the difference is {pair['difference_points']:+.1f} "
                    f"points [{low:+.1f}, {high:+.1f}]"
                )
            return said + "."
    return said


def _solved(entry: Mapping[str, Any]) -> str:
    return percent(entry).shown if entry["episodes"] else "no episode yet"


def _cost(entry: Mapping[str, Any]) -> str:
    """Forwards and latency of a decoder, as far as they are known."""
    found = []
    if "forwards_mean" in entry:
        found.append(f"{entry['forwards_mean']:.2f} forwards a chunk")
    if "total_ms" in entry:
        found.append(f"{entry['total_ms']['p50']:.1f} ms (p50)")
    return f" at {' and '.join(found)}" if found else ""


def decoder_table(runs: Sequence[Run]) -> Markup:
    """All decoders of one or several runs."""
    several = len(runs) > 1
    rows: list[list[str | Cell]] = []
    for run in runs:
        for name, entry in run.values["decoders"].items():
            times = entry.get("total_ms", {})
            agreed = entry.get("equal_to_ar")
            rows.append(
                [
                    *([run.name] if several else []),
                    name,
                    percent(entry),
                    number(entry.get("forwards_mean")),
                    *(number(times.get(part), "{:.1f}") for part in ("p50", "p95", "p99")),
                    number(entry.get("speedup_vs_ar"), "{:.1f}x"),
                    number(None if agreed is None else 100 * agreed, "{:.1f} %"),
                ]
            )
    columns = ("run", *COLUMNS) if several else COLUMNS
    return table(columns, rows, "Decoders; a click on a column sorts the table")


def pareto(runs: Sequence[Run]) -> Plot:
    """Success against latency, or against forwards where nothing was timed."""
    timed = any("total_ms" in row for run in runs for row in run.values["decoders"].values())
    traces = []
    costs: list[float] = []
    for index, run in enumerate(runs):
        shown = {
            name: entry
            for name, entry in run.values["decoders"].items()
            if entry["episodes"] and _pareto_cost(entry, timed) > 0
        }
        rates = [100 * entry["success_rate"] for entry in shown.values()]
        ends = [[100 * end for end in entry["success_ci95"]] for entry in shown.values()]
        cost = [_pareto_cost(entry, timed) for entry in shown.values()]
        costs += cost
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": label(run.name),
                "x": cost,
                "y": rates,
                "text": readable_labels([label(name) for name in shown], cost, rates),
                "customdata": [label(name) for name in shown],
                "textposition": "top center",
                "error_y": interval_bars(rates, ends),
                "marker": {"size": 10, "color": PALETTE[index % len(PALETTE)]},
                "hovertemplate": "%{customdata}: %{y:.1f} %, %{x:.2f}<extra></extra>",
            }
        )
    unit = "latency of a chunk, p50 [ms]" if timed else "forwards of a chunk"
    layout = {
        "xaxis": log_axis(unit, costs),
        "yaxis": axis("success [%]", range=[None, 104]),
        "showlegend": len(runs) > 1,
    }
    return Plot(f"Success against {unit}", traces, layout, height=420)


def readable_labels(
    names: Sequence[str], costs: Sequence[float], rates: Sequence[float]
) -> list[str]:
    """The names of points that have room for them, "" for the others; best points first.

    Args:
        names: Of the points.
        costs: On a logarithmic axis, all above 0.
        rates: [%].
    """
    span = max(math.log(max(costs) / min(costs)), 1e-9) if costs else 1.0
    order = sorted(range(len(names)), key=lambda i: (-rates[i], costs[i]))
    chosen: dict[int, tuple[float, float, float]] = {}
    for index in order:
        place = math.log(costs[index]) / span
        half = 0.5 * LETTER * len(names[index])
        if all(
            abs(place - x) > half + other or abs(rates[index] - y) > LINE
            for x, y, other in chosen.values()
        ):
            chosen[index] = (place, rates[index], half)
    return [name if index in chosen else "" for index, name in enumerate(names)]


def _pareto_cost(entry: Mapping[str, Any], timed: bool) -> float:
    """Latency [ms] or forwards of a decoder; 0 if unknown."""
    cost = entry.get("total_ms", {}).get("p50", 0) if timed else entry.get("forwards_mean", 0)
    return float(cost)


def success_plot(rows: Mapping[str, Any]) -> Plot:
    """Success of every decoder, with intervals."""
    shown = {name: row for name, row in reversed(list(rows.items())) if row["episodes"]}
    rates = [100 * row["success_rate"] for row in shown.values()]
    ends = [[100 * end for end in row["success_ci95"]] for row in shown.values()]
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [label(name) for name in shown],
        "x": rates,
        "error_x": interval_bars(rates, ends),
        "marker": {"color": PALETTE[0]},
        "hovertemplate": "%{y}: %{x:.1f} %<extra></extra>",
    }
    layout = {"xaxis": axis("success [%], 95 % interval", range=[0, 100]), "yaxis": axis("")}
    return Plot("Success", [trace], layout, height=120 + 28 * len(shown))


def delay_plot(runs: Sequence[Run]) -> Plot | None:
    """Success against the delay in the loop; None without delays."""
    traces: list[dict[str, Any]] = []
    for run in runs:
        curves: dict[str, list[Mapping[str, Any]]] = {}
        for entry in run.values["decoders"].values():
            if entry["episodes"]:
                curves.setdefault(entry["delay_of"], []).append(entry)
        for name, entries in curves.items():
            if len(entries) < 2:
                continue
            entries.sort(key=lambda entry: entry["delay_steps"])
            rates = [100 * entry["success_rate"] for entry in entries]
            ends = [[100 * end for end in entry["success_ci95"]] for entry in entries]
            fps = run.values["fps"]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": label(f"{run.name}: {name}" if len(runs) > 1 else name),
                    "x": [1000 * entry["delay_steps"] / fps for entry in entries],
                    "y": rates,
                    "error_y": interval_bars(rates, ends),
                    "marker": {"color": PALETTE[len(traces) % len(PALETTE)]},
                }
            )
    if not traces:
        return None
    layout = {
        "xaxis": axis("delay of a chunk in the loop [ms]"),
        "yaxis": axis("success [%]", range=[0, 102]),
        "showlegend": True,
    }
    return Plot("Success against the latency in the loop", traces, layout)


def _task_plot(rows: Mapping[str, Any]) -> Plot | None:
    """Bars of the success of every decoder in every task; None for a single task."""
    tasks = sorted({task for row in rows.values() for task in row.get("per_task", {})})
    if len(tasks) < 2:
        return None
    traces = [
        {
            "type": "bar",
            "name": label(name),
            "x": [label(task) for task in tasks],
            "y": [
                100 * found["success_rate"] if (found := row["per_task"].get(task)) else None
                for task in tasks
            ],
            "marker": {"color": PALETTE[index % len(PALETTE)]},
        }
        for index, (name, row) in enumerate(rows.items())
    ]
    layout = {
        "barmode": "group",
        "xaxis": axis(""),
        "yaxis": axis("success [%]", range=[0, 102]),
        "showlegend": True,
    }
    return Plot("Success by task", traces, layout)


def _paired(rows: Mapping[str, Any]) -> Iterator[list[str | Cell]]:
    """Rows of the table of paired comparisons."""
    for name, entry in rows.items():
        for reference, pair in entry.get("paired", {}).items():
            low, high = pair["ci95_points"]
            difference = pair["difference_points"]
            yield [
                name,
                reference,
                Cell(f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]", difference),
                f"{pair['only_this']} : {pair['only_reference']} of {pair['episodes']}",
                number(pair["sign_test_p"], "{:.2g}"),
            ]


def _clips(run: Run) -> Iterator[Markup]:
    """The clips that the report of a run lists, failures first."""
    solved = run.values.get("clips", {}).get("solved", {})
    left = MOST_CLIPS
    for name, success in sorted(solved.items(), key=lambda item: item[1]):
        file = run.folder / f"clip_{name}.mp4"
        if "/" in name or not file.is_file() or file.is_symlink():
            continue
        caption = element("figcaption", f"{name}: {'solved' if success else 'not solved'}")
        size = file.stat().st_size
        if size > left:
            yield element("figure", element("p", f"{file.name} is too large for a page."), caption)
            continue
        left -= size
        contents = read_bytes(file, ConfigError, most=MOST_CLIPS)
        source = f"data:video/mp4;base64,{base64.b64encode(contents).decode()}"
        video = element(
            "video", src=source, controls="", loop="", muted="", playsinline="", preload="metadata"
        )
        yield element("figure", video, caption, class_="clip")


def _settings(report: Mapping[str, Any]) -> Markup:
    """Conditions of an evaluation."""
    seeds = report["seeds"]
    first, count = seeds["first"], seeds["count"]
    names = ("policy", "teacher")
    checkpoints = [
        f"{role} {report[role]['name']} ({report[role]['sha256']})"
        for role in names
        if report.get(role)
    ]
    shown = {
        "environment": f"{report['env']}, task {report['task']}",
        "episodes": f"{count} a decoder, seeds {first} to {first + count - 1}",
        "shard": "{} of {}".format(*report["shard"]) if "shard" in report else "",
        "checkpoints": ", ".join(checkpoints),
        "executed steps": f"{report['executed_steps']} of {report['chunk_size']}",
        "control rate": f"{report['fps']} Hz",
    }
    return settings(shown, report)
