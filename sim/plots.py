"""Figures of an evaluation report, drawn off screen in a colour-blind-safe palette."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY

# Okabe and Ito's palette.
BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
VERMILLION = "#D55E00"
GREY = "#8A8F98"
INK, FAINT = "#23262B", "#DDE1E6"
STYLE: Any = {  # rcParams
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#A9AFB8",
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FORWARDS = "forwards.png"
PLOTS = ("success.png", "latency.png", FORWARDS, "delays.png")


def _token_by_token(name: str) -> bool:
    return name.removeprefix("teacher_").partition("@")[0] in ("ar", "ar_h")


def row_color(name: str) -> str:
    """Colour of a decoder: grey if autoregressive, light blue if of the teacher."""
    if _token_by_token(name):
        return GREY
    if name.startswith("teacher_"):
        return SKY
    return (
        VERMILLION
        if name.startswith(("ceed", "conf"))
        else BLUE
        if name.startswith("jacobi")
        else GREEN
    )


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `PLOTS` into a folder, except those without data."""
    with mpl.rc_context(STYLE):
        figures = (
            draw(report) for draw in (success_figure, latency_figure, forwards_figure, delay_figure)
        )
        drawn = [
            (name, figure)
            for name, figure in zip(PLOTS, figures, strict=True)
            if figure is not None
        ]
        return [save_figure(figure, folder / name) for name, figure in drawn]


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Save as PNG, atomically."""
    with replacing(path) as file:
        figure.savefig(
            file,
            dpi=dpi,
            facecolor="white",
            bbox_inches="tight",
            pad_inches=0.15,
            format="png",
            metadata={"Software": MADE_BY},
        )
    return path


def success_figure(report: Mapping[str, Any]) -> Figure | None:
    """Success rate with its Wilson interval; per-task rates as small dots."""
    rows = {name: entry for name, entry in report["decoders"].items() if entry["episodes"]}
    if not rows:
        return None
    figure, axes = _bar_canvas(rows)
    for y, (name, entry) in enumerate(rows.items()):
        rate, (low, high) = 100 * entry["success_rate"], (100 * v for v in entry["success_ci95"])
        axes.barh(y, rate, height=0.62, color=row_color(name), alpha=0.85, zorder=2)
        axes.errorbar(
            rate, y, xerr=[[rate - low], [high - rate]], color=INK, capsize=4, lw=1.3, zorder=4
        )
        axes.text(
            103, y, f"{entry['success']}/{entry['episodes']}", va="center", ha="left", fontsize=9
        )
        tasks = [100 * task["success_rate"] for task in entry["per_task"].values()]
        if len(tasks) > 1:
            axes.scatter(
                tasks, [y] * len(tasks), s=16, facecolor="white", edgecolor=INK, lw=0.8, zorder=3
            )
    axes.set(
        xlim=(0, 112),
        xticks=range(0, 101, 20),
        xlabel=(
            "episodes solved [%]\nbar: all episodes   whisker: its 95 % Wilson interval   white "
            "dots: single task families"
        ),
        title="Success on the same seeds",
    )
    return figure


def latency_figure(report: Mapping[str, Any]) -> Figure | None:
    """p50, p95 and p99 of the end-to-end latency of a chunk, with the prefill part and the
    speed-up.
    """
    rows = {name: entry for name, entry in report["decoders"].items() if entry.get("total_ms")}
    if not rows:
        return None
    figure, axes = _bar_canvas(rows)
    longest = max(entry["total_ms"]["p99"] for entry in rows.values())
    for y, (name, entry) in enumerate(rows.items()):
        latency = entry["total_ms"]
        color = row_color(name)
        axes.barh(y, latency["p50"], height=0.62, color=color, alpha=0.85, zorder=2)
        rest = latency["p50"] - entry["decode_ms"]["p50"]
        axes.barh(
            y,
            rest,
            height=0.62,
            color="white",
            alpha=0.45,
            zorder=3,
            hatch="////",
            edgecolor=color,
            lw=0,
        )
        axes.plot([latency["p50"], latency["p99"]], [y, y], color=INK, lw=1.2, zorder=4)
        axes.plot(latency["p95"], y, "o", color=INK, ms=4.5, zorder=5)
        axes.plot(latency["p99"], y, "|", color=INK, ms=10, mew=1.6, zorder=5)
        text = f"{latency['p50']:.1f} ms   {entry['speedup_vs_ar']:.1f}x"
        axes.text(longest * 1.03, y, text, va="center", ha="left", fontsize=9)
    threads = report["hardware"]["threads"]
    device = report["hardware"]["device"]
    axes.set(
        xlim=(0, longest * 1.28),
        xlabel=(
            "time from observation to chunk [ms]\n"
            "bar: p50, hatched: preprocessing and prefill   dot: p95   tick: p99\n"
            "at the right: p50, and the speed-up over the same model token by token"
        ),
        title=f"Latency at batch 1, {device}, {threads} thread{'s' if threads != 1 else ''}",
    )
    return figure


def forwards_figure(report: Mapping[str, Any]) -> Figure | None:
    """Block forwards of the chunks; autoregressive rows are only listed in the note."""
    rows = {
        name: entry for name, entry in report["decoders"].items() if entry.get("forwards_histogram")
    }
    block = {name: entry for name, entry in rows.items() if not _token_by_token(name)}
    if not block:
        return None
    counts = {
        name: {int(k): v for k, v in entry["forwards_histogram"].items()}
        for name, entry in block.items()
    }
    longest = max(max(histogram) for histogram in counts.values())
    figure = Figure(figsize=(8.2, 0.85 * len(block) + 1.4))
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(len(block), 1, sharex=True)))
    for axes, (name, histogram) in zip(panels, counts.items(), strict=True):
        total = sum(histogram.values())
        for k, count in histogram.items():
            axes.bar(
                k, 100 * count / total, width=0.78, color=row_color(name), alpha=0.88, zorder=2
            )
        mean = block[name]["forwards_mean"]
        axes.axvline(mean, color=INK, lw=1.2, ls=(0, (3, 2)), zorder=3)
        axes.set_ylabel("chunks [%]", fontsize=9)
        axes.set(ylim=(0, 112), yticks=(0, 100))
        axes.tick_params(axis="y", labelsize=7.5, length=0)
        axes.text(
            1.01,
            0.5,
            f"{name}\nmean {mean:.2f}",
            transform=axes.transAxes,
            va="center",
            fontsize=10,
        )
    step = 1 if longest <= 16 else 5
    panels[-1].set(xlim=(0.3, longest + 0.7), xticks=range(step, longest + 1, step))
    single = [
        f"{name} {entry['forwards_mean']:.0f}" for name, entry in rows.items() if name not in block
    ]
    note = f"   (single-token forwards: {', '.join(single)})" if single else ""
    panels[-1].set_xlabel(
        f"block forwards of one chunk, after the prefill{note}\ndashed line: mean over all chunks"
    )
    panels[0].set_title("Forwards per chunk in the closed loop")
    figure.subplots_adjust(hspace=0.45)
    return figure


def delay_figure(report: Mapping[str, Any]) -> Figure | None:
    """Success against the control steps that a chunk takes: a line per decoder, 95 % intervals."""
    lines: dict[str, list[Any]] = {}
    for entry in report["decoders"].values():
        if entry["episodes"]:
            lines.setdefault(entry.get("delay_of", ""), []).append(entry)
    if not any(entry.get("delay_steps") for entries in lines.values() for entry in entries):
        return None
    figure = Figure(figsize=(8.2, 4.4))
    axes = figure.subplots()
    for shift, (name, entries) in enumerate(lines.items()):
        entries.sort(key=lambda entry: entry["delay_steps"])
        # (delays, 3)
        rates = 100 * np.array([(e["success_rate"], *e["success_ci95"]) for e in entries])
        bars = np.abs(rates[:, 1:] - rates[:, :1]).T
        steps = [entry["delay_steps"] + 0.04 * (shift - (len(lines) - 1) / 2) for entry in entries]
        axes.errorbar(
            steps, rates[:, 0], bars, color=row_color(name), marker="o", capsize=3, label=name
        )
    longest = max(entry["delay_steps"] for entries in lines.values() for entry in entries)
    taken = f"control steps (of {1 / report['fps']:.3g} s) that a chunk takes"
    axes.set(ylim=(0, 103), xticks=range(longest + 1), xlabel=taken, ylabel="episodes solved [%]")
    axes.set_title("Success with latency in the loop")
    axes.yaxis.grid(True, color=FAINT)
    axes.legend(frameon=False)
    return figure


def _bar_canvas(rows: Mapping[str, Any]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.2, 0.48 * len(rows) + 1.5))
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color=FAINT, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes
