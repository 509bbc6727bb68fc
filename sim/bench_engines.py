"""The tables of ``bench.md`` that compare engines: every row in every engine, and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ceed_vla.sim.report import markdown_table
from ceed_vla.sim.timing import PARTS

ROW_COLUMNS = (
    "decoder",
    "engine",
    "after a pause p50 / p95 / p99 [ms]",
    "in a loop p50 / p99",
    "x AR",
    "x AR_h",
    "over floor",
)
PART_COLUMNS = ("model", "engine", *(f"{part} p50 / p99 [ms]" for part in PARTS), "floor [ms]")


def engine_tables(timing: Mapping[str, Any]) -> str:
    """Both tables, of the entry `timing` of a report; empty for a single engine."""
    engines = {engine for found in timing.get("totals", {}).values() for engine in found}
    if len(engines) < 2:
        return ""
    return "\n".join(
        (
            "Every row in every engine that runs it, in turns. Ratios are of the times after a "
            "pause; AR, AR_h and the floor are those of the same engine.",
            "",
            markdown_table(ROW_COLUMNS, _rows(timing)),
            "",
            "Parts of a chunk, one after the other behind a pause. The floor is the prefill and "
            "one block forward.",
            "",
            markdown_table(PART_COLUMNS, _parts(timing)),
        )
    )


def floor_of(timing: Mapping[str, Any], model: str, engine: str) -> float | None:
    """Prefill and one block forward of a model in an engine, p50 [ms]; None if not timed."""
    found = timing["parts"].get(f"{model} {engine}")
    return None if found is None else found["prefill"]["p50"] + found["block"]["p50"]


def _rows(timing: Mapping[str, Any]) -> list[tuple[str, ...]]:
    totals = timing["totals"]
    lines = []
    for name, found in totals.items():
        model, prefix = ("teacher", "teacher_") if name.startswith("teacher_") else ("policy", "")
        for engine, latency in found.items():
            loop = timing["loops"][name][engine]
            rivals = [
                totals.get(prefix + rival, {}).get(engine, {}).get("p50")
                for rival in ("ar", "ar_h")
            ]
            floor = floor_of(timing, model, engine)
            lines.append(
                (
                    f"`{name}`",
                    engine,
                    " / ".join(f"{latency[p]:.1f}" for p in ("p50", "p95", "p99")),
                    " / ".join(f"{loop[p]:.1f}" for p in ("p50", "p99")),
                    *("-" if p50 is None else f"{p50 / latency['p50']:.1f}" for p50 in rivals),
                    "-" if floor is None else f"{latency['p50'] / floor:.2f}",
                )
            )
    return lines


def _parts(timing: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    for name, found in timing["parts"].items():
        model, _, engine = name.partition(" ")
        floor = floor_of(timing, model, engine) if engine else None
        if floor is not None:
            shown = (f"{found[part]['p50']:.2f} / {found[part]['p99']:.2f}" for part in PARTS)
            lines.append((model, engine, *shown, f"{floor:.1f}"))
    return lines
