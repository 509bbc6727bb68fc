"""``ceed-vla bench``: compare decoders in one run: success, forwards, and latency over the floor.

Latency is that of a robot, which pauses between two chunks (`ceed_vla.sim.timing`); beside it
stands the latency in a loop. The floor of a chunk is the latency that no decoder of this model can
undercut: the prefill and one forward of the block, timed alone, in the same run. Every row is timed
in all engines that run it, and shown in its fastest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import ceed_vla.sim.rivals
from ceed_vla.axes import AXES
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.fields import chosen, ranged
from ceed_vla.files import write_text
from ceed_vla.outputs import claimed_folder
from ceed_vla.report.command import PAGE, write_page
from ceed_vla.sim.bench_engines import engine_tables, floor_of
from ceed_vla.sim.engines import ENGINES
from ceed_vla.sim.episode_log import EPISODES
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.evaluation_report import REPORT
from ceed_vla.sim.plots import FAINT, FORWARDS, GREY, INK, save_figure
from ceed_vla.sim.report import PAIRED, PAIRED_COLUMNS, cells, markdown_table, paired_rows

BENCH = "bench.json"
TABLE = "bench.md"
PARETO = "pareto.png"
MOST_LINES = 30  # decoders in the figure
ROWS = (
    "jacobi,jacobi_h,jacobi_mid,jacobi_random,cap1,cap2,cap3,cap4,cap2_fresh,cap3_fresh,ceed,"
    "conf0.2_cap2_fresh,gap0.2_cap2,deadline8"
)
TEACHER_ROWS = (
    "teacher_ar_h,teacher_jacobi_h,teacher_cap1,teacher_cap2,teacher_cap3,teacher_cap2_fresh,"
    "teacher_cap3_fresh,teacher_cap4_fresh"
)


@dataclass
class BenchConfig(EvalConfig):
    """Options of ``ceed-vla bench``; they are those of ``ceed-vla eval``, with other defaults.

    Attributes:
        decoders: As for `ceed-vla eval`, in addition to ar and ar_h. Empty: the usual rows, the
            checkpoint's own names, decoders of its exits, and the teacher's rows.
        output_dir: Folder for bench.json, bench.md, pareto.png and the files of `ceed-vla eval`.
    """

    decoders: str = ""
    episodes: int = ranged(400, "[1, 100000]")
    output_dir: str = "outputs/bench"
    clips: bool = False
    engine: str = chosen("fastest", ENGINES)


def bench(config: BenchConfig) -> dict[str, Any]:
    """Evaluate all rows and write their latency over the floor.

    Returns:
        The contents of ``bench.json``.

    Raises:
        ConfigError: An invalid option, e.g. an unknown decoder.
        CheckpointError: A checkpoint cannot be loaded.
    """
    if not config.decoders:
        folder = resolve_checkpoint(config.policy.given())
        policy = CeedVLAConfig.read(folder)
        alone = config.workers == 1 and not config.cluster.chosen
        usual = [name for name in usual_rows(policy) if alone or not name.startswith("deadline")]
        rows = [*usual, *policy.decodings]
        for axis in AXES.values():
            rows += axis.bench_rows(policy, folder)
        if config.teacher.path:
            rows.append(TEACHER_ROWS)
        config.decoders = ",".join(rows)
    config.decoders = f"ar,ar_h,{config.decoders}"  # everything is compared with them
    own = (BENCH, TABLE, PARETO)
    with claimed_folder("output_dir", config.output_dir, own, (REPORT, EPISODES)) as folder:
        return _bench(config, folder)


def _bench(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Run `bench` in a claimed folder."""
    report = evaluate(
        config, None, lambda bundles: {"act": ceed_vla.sim.rivals.act(bundles["policy"])}
    )
    result = {**report, "decoders": rows_of(report)}
    if report["timing"]:
        result["floor_ms"], result["ar_over_parts"] = floor(report, "policy"), ar_over_parts(report)
        save_figure(pareto(result), folder / PARETO)
    write_text(folder / BENCH, json.dumps(result, indent=2))
    write_text(folder / TABLE, markdown(result))
    write_page([folder], folder / PAGE)  # with what `evaluate` does not know
    return result


def usual_rows(policy: CeedVLAConfig) -> list[str]:
    """Rows that a policy supports; none with `conf` for unordered tokens, such as FAST's."""
    left_out = () if policy.action_tokens.ordered else ("conf",)
    return [name for name in ROWS.split(",") if not name.startswith(left_out)]


def floor(report: Mapping[str, Any], model: str) -> float:
    """Prefill and one block forward, p50 in the fastest engine [ms]."""
    timing = report["timing"]
    floors = (floor_of(timing, model, name.partition(" ")[2]) for name in timing["parts"])
    return min(found for found in floors if found is not None)


def ar_over_parts(report: Mapping[str, Any]) -> float:
    """Ratio of AR's latency to the sum of its parts, each timed alone (p50, in AR's engine).

    The parts are preprocessing, prefill and the single-token forwards.
    """
    entry = report["decoders"]["ar"]
    timing = report["timing"]
    found = timing["parts"][f"policy {timing['engines']['ar']}"]
    alone = (
        found["process"]["p50"]
        + found["prefill"]["p50"]
        + (report["block_length"] - 1) * found["token"]["p50"]
    )
    return round(entry["total_ms"]["p50"] / alone, 3)


def rows_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``bench.json``: those of the report, and ratios of p50 latencies.

    ``ratio_to_floor`` is a row's latency over the same model's floor. ``ratio_to_ar_compiled`` and
    ``ratio_to_ar_h_compiled`` are the latency of its AR, and of its AR of the executed steps, each
    in the fastest engine, over that of the row.
    """
    rows = {name: dict(entry) for name, entry in report["decoders"].items()}
    for name, row in rows.items():
        if "total_ms" not in row:
            continue
        model, prefix = ("teacher", "teacher_") if name.startswith("teacher_") else ("policy", "")
        p50 = row["total_ms"]["p50"]
        share = (
            report["executed_steps"] / report["chunk_size"]
            if row["decoding"]["watch"] == "executed"
            else 1
        )
        row["tokens_per_forward"] = round(report["block_length"] * share / row["forwards_mean"], 2)
        row["engine"] = report["timing"]["engines"][name]
        row["ratio_to_floor"] = round(p50 / floor(report, model), 3)
        for rival in ("ar", "ar_h"):
            if prefix + rival in rows:
                row[f"ratio_to_{rival}_compiled"] = round(
                    rows[prefix + rival]["total_ms"]["p50"] / p50, 3
                )
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """Return the contents of ``bench.md``."""
    head = (
        "decoder",
        "solved [95 %]",
        "forwards mean / p95",
        "layers block + prefix",
        "after a pause p50 / p95 / p99 [ms]",
        "in a loop",
        "prefill",
        "decode",
        "tokens a forward",
        "engine",
        "x AR",
        "x AR_h",
        "over floor",
        "action error",
        "= AR",
    )
    lines = []
    for name, row in result["decoders"].items():
        *first, _, _, _, agreement = cells(name, row)
        own = ["-"] * (len(head) - len(first) - 1)
        if "total_ms" in row:
            own = [
                *(f"{row[f'{part}_ms']['p50']:.1f}" for part in ("loop", "prefill", "decode")),
                f"{row['tokens_per_forward']:.1f}",
                row["engine"],
                *(
                    f"{row[name]:.1f}" if (name := f"ratio_to_{r}_compiled") in row else "-"
                    for r in ("ar", "ar_h")
                ),
                f"{row['ratio_to_floor']:.2f}",
                f"{row['action_error']:.4f}",
            ]
        lines.append((*first, *own, agreement))
    parts = [f"# {result['env']}, {result['task']}", "", markdown_table(head, lines), ""]
    if pairs := paired_rows(result):
        parts += [PAIRED, "", markdown_table(PAIRED_COLUMNS, pairs), ""]
    if "floor_ms" in result:
        parts += [
            (
                f"Floor (prefill and one block forward, alone): {result['floor_ms']:.1f} ms. AR "
                f"over the sum of its parts: {result['ar_over_parts']:.2f}. LeRobot's ACT, default "
                f"size: {result['timing']['parts']['act']['total']['p50']:.1f} ms."
            ),
            "",
            f"![success against latency]({PARETO})",
            "",
            f"![forwards of the chunks]({FORWARDS})",
            "",
        ]
    if result["timing"] and (engines := engine_tables(result["timing"])):
        parts += [engines, ""]
    return "\n".join([*parts, f"*{result['program']}*", ""])


def pareto(result: Mapping[str, Any]) -> Figure:
    """Latency and failures, one line a decoder, the fastest at the top.

    Decoders that no other one beats in both are filled and in black; the others are hollow and
    grey. Of more than `MOST_LINES` decoders, those that fail most are left out.
    """
    rows = {
        name: row
        for name, row in result["decoders"].items()
        if row.get("total_ms") and row["episodes"]
    }
    best = front(rows)
    by_failure = sorted(rows, key=lambda name: (name not in best, -rows[name]["success_rate"]))
    shown = sorted(by_failure[:MOST_LINES], key=lambda name: rows[name]["total_ms"]["p50"])
    figure = Figure(figsize=(6.4, 0.25 * len(shown) + 1.3))
    times, failures = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(shown):
        latency = rows[name]["total_ms"]
        low, middle, high = failure_interval(rows[name])
        for axes, start, dot, end in (
            (times, latency["p50"], latency["p50"], latency["p99"]),
            (failures, low, middle, high),
        ):
            color = INK if name in best else GREY
            axes.plot([start, end], [y, y], color=color, lw=1, zorder=2)
            face = color if name in best else "white"
            axes.plot(dot, y, "o", color=color, markerfacecolor=face, ms=5, zorder=3)
    times.axvline(result["floor_ms"], color=INK, lw=1, ls=(0, (3, 2)))
    times.set_yticks(range(len(shown)), shown, fontsize=8)
    for label, name in zip(times.get_yticklabels(), shown, strict=True):
        label.set_color(INK if name in best else GREY)
    times.set(
        ylim=(len(shown) - 0.4, -0.6),
        xscale="log",
        xlabel="observation to chunk, after a pause [ms]\ndot: p50, line: to p99, dashed: floor",
    )
    failures.set(xscale="log", xlabel="episodes not solved [%]\nline: 95 % interval")
    for axes in (times, failures):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.label.set_size(8)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.grid(True, color=FAINT, zorder=0)
    times.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left_out = len(rows) - len(shown)
    note = f" ({left_out} that fail more are left out)" if left_out else ""
    figure.suptitle(f"Latency and failures{note}\nblack: not beaten in both", fontsize=9)
    figure.tight_layout()
    return figure


def front(rows: Mapping[str, Any]) -> set[str]:
    """The decoders for which no other one is faster at p50 and fails no more often."""
    points = {name: (row["total_ms"]["p50"], 1 - row["success_rate"]) for name, row in rows.items()}
    return {
        name
        for name, (x, y) in points.items()
        if not any((a < x and b <= y) or (a <= x and b < y) for a, b in points.values())
    }


def failure_interval(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Episodes that a decoder did not solve [%]: the ends of the 95 % interval around the rate.

    For the logarithm, no failure counts as half an episode.
    """
    least = 0.5 / row["episodes"]
    low, high = row["success_ci95"]
    rates = (1 - high, 1 - row["success_rate"], 1 - low)
    return tuple(100 * max(rate, least) for rate in rates)  # type: ignore[return-value]
