"""``ceed-vla bench``: a policy against its rivals in one run: success, forwards, and milliseconds
over the floor.

The floor of a chunk is what no decoder of this model can save: the prefill and one forward of the
block, timed alone, in the same run and engine. Every row is timed in both engines and shown in its
faster one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import ceed_vla.sim.rivals
from ceed_vla.axes import AXES
from ceed_vla.checkpoints import resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.fields import chosen
from ceed_vla.files import write_text
from ceed_vla.outputs import claimed_folder
from ceed_vla.sim.episode_log import EPISODES
from ceed_vla.sim.evaluate import evaluate
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.evaluation_report import REPORT
from ceed_vla.sim.plots import FORWARDS, INK, row_color, save_figure
from ceed_vla.sim.report import PAIRED, PAIRED_COLUMNS, cells, markdown_table, paired_rows
from ceed_vla.sim.timing import ENGINES

BENCH = "bench.json"
TABLE = "bench.md"
PARETO = "pareto.png"
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
        decoders: As for `ceed-vla eval`, beside ar and ar_h; empty for the usual rivals, the
            checkpoint's own names, what its exits can, and the teacher's.
        output_dir: Folder for bench.json, bench.md, pareto.png and what `ceed-vla eval` writes.
    """

    decoders: str = ""
    episodes: int = 400
    output_dir: str = "outputs/bench"
    clips: bool = False
    engine: str = chosen("fastest", ENGINES)


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run all rows as `evaluate` does and write what they are over the floor; returns
    ``bench.json``.

    Raises:
        ConfigError: An option that cannot work, e.g. an unknown decoder.
        CheckpointError: A checkpoint that cannot be loaded.
    """
    if not config.decoders:
        folder = resolve_checkpoint(config.policy.given())
        policy = CeedVLAConfig.read(folder)
        usual = [
            name
            for name in usual_rows(policy)
            if config.workers == 1 or not name.startswith("deadline")
        ]
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
    """As `bench`, into a folder of its own."""
    report = evaluate(
        config, None, lambda bundles: {"act": ceed_vla.sim.rivals.act(bundles["policy"])}
    )
    result = {**report, "decoders": rows_of(report)}
    if report["timing"]:
        result["floor_ms"], result["ar_over_parts"] = floor(report, "policy"), ar_over_parts(report)
        save_figure(pareto(result), folder / PARETO)
    write_text(folder / BENCH, json.dumps(result, indent=2))
    write_text(folder / TABLE, markdown(result))
    return result


def usual_rows(policy: CeedVLAConfig) -> list[str]:
    """What every policy of its kind can: FAST tokens have no neighbours."""
    left_out = () if policy.action_tokens.ordered else ("conf",)
    return [name for name in ROWS.split(",") if not name.startswith(left_out)]


def floor(report: Mapping[str, Any], model: str) -> float:
    """Prefill and one block forward, p50 in the faster engine [ms]."""
    parts = report["timing"]["parts"]
    return min(
        found["prefill"]["p50"] + found["block"]["p50"]
        for name, found in parts.items()
        if name.startswith(f"{model} ")
    )


def ar_over_parts(report: Mapping[str, Any]) -> float:
    """The time of AR over that of its parts alone: processing, prefill, single-token forwards (p50,
    in AR's engine).
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
    """The entries of ``bench.json``: those of the report, and ratios of p50 of chunks to the same
    model's floor, and to its AR and AR of the executed steps in their faster engines
    (``ratio_to_ar_compiled``).
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
    """``bench.md``."""
    head = (
        "decoder",
        "solved [95 %]",
        "forwards mean / p95",
        "layers block + prefix",
        "total p50 / p95 / p99 [ms]",
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
                *(f"{row[f'{part}_ms']['p50']:.1f}" for part in ("prefill", "decode")),
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
    return "\n".join([*parts, f"*{result['program']}*", ""])


def pareto(result: Mapping[str, Any]) -> Figure:
    """Failures against latency: p50 as dots, a line to p99; rows that no other beats in both are in
    colour.
    """
    rows = {
        name: row
        for name, row in result["decoders"].items()
        if row.get("total_ms") and row["episodes"]
    }
    points = {  # none failed: half an episode, for the logarithm
        name: (row["total_ms"]["p50"], 100 * max(1 - row["success_rate"], 0.5 / row["episodes"]))
        for name, row in rows.items()
    }
    figure = Figure(figsize=(9.5, 6))
    axes = figure.subplots()
    for index, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        beaten = any((a < x and b <= y) or (a <= x and b < y) for a, b in points.values())
        color = "#B9BEC6" if beaten else row_color(name)
        axes.plot([x, rows[name]["total_ms"]["p99"]], [y, y], color=color, lw=1, zorder=2)
        axes.plot(x, y, "o", color=color, ms=5 if beaten else 7, zorder=3)
        place = (3, 5 if index % 2 else -10)
        ink = "#8A8F98" if beaten else INK
        axes.annotate(
            name,
            (x, y),
            place,
            textcoords="offset points",
            fontsize=6.5 if beaten else 8,
            color=ink,
        )
    axes.axvline(result["floor_ms"], color=INK, lw=1, ls=(0, (3, 2)))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="time from observation to chunk [ms]\ndot: p50   line: to p99   dashed: the floor",
        ylabel="episodes not solved [%]",
        title="Failures against latency",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=6)
    axes.invert_yaxis()
    return figure
