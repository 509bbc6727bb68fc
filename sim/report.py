"""The report of an evaluation as text: Markdown for the file, the same rows for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ceed_vla.outputs import MADE_BY
from ceed_vla.wording import counted

COLUMNS = (  # a line break is a space in Markdown
    "decoder",
    "success\n[95 %]",
    "forwards\nmean / p95",
    "layers\nblock + prefix",
    "latency [ms]\np50 / p95 / p99",
    "rate\n[Hz]",
    "speed\n-up",
    "decode\nspeed-up",
    "tokens\n= AR",
)
NOTES = (
    "success: 95 % Wilson interval; every row ran the same seeds.",
    (
        "forwards: after the prefill, per chunk, in the closed loop; single-token forwards for ar "
        "and ar_h."
    ),
    "layers: layers that ran in these forwards + layers of the prefix; means per chunk.",
    (
        "latency: preprocessing, prefill and decoding of one chunk at batch 1, after a pause of 10 "
        "to 100 ms; same observations, in an order drawn for each."
    ),
    (
        "rate: executed steps per p50 latency, the rate at which the policy can feed a robot "
        "without pausing."
    ),
    (
        "speed-up: p50 latency of the same model's full autoregressive decoder in this run / own "
        "p50 latency; decode speed-up: the same without preprocessing and prefill."
    ),
    (
        "tokens = AR: share of executed tokens equal to the same model's greedy tokens, on the "
        "timing observations."
    ),
)
_MISSING = "-"


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the main table, one tuple of `COLUMNS` for every decoder."""
    return [cells(name, entry) for name, entry in report["decoders"].items()]


def _by_decoder(
    report: Mapping[str, Any], key: str, cell: Callable[[Any], str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of a table with a column for every name in the decoders' `key` entries."""
    found = {name: entry.get(key, {}) for name, entry in report["decoders"].items()}
    columns = sorted({column for values in found.values() for column in values})
    rows = [
        (name, *(cell(values.get(column)) for column in columns)) for name, values in found.items()
    ]
    return ("decoder", *columns), rows


def paired_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the paired comparisons: row, reference, difference, discordant episodes, p."""
    pairs = (
        (name, *pair)
        for name, entry in report["decoders"].items()
        for pair in entry.get("paired", {}).items()
    )
    forms = (
        "{difference_points:+.1f} [{ci95_points[0]:+.1f}, {ci95_points[1]:+.1f}]",
        "{only_this} : {only_reference} of {episodes}",
        "{sign_test_p:.2g}",
    )
    return [
        (name, reference, *(form.format(**pair) for form in forms))
        for name, reference, pair in pairs
    ]


DELAYS = (
    "While a chunk is decoded, the robot continues the previous one, and holds where it ends. A "
    "delay is rounded up to whole control steps. Means are over the solved episodes; motion is in "
    "the units of the actions."
)
DELAY_COLUMNS = (
    "decoder",
    "delay [steps]",
    "success [95 %]",
    "seconds",
    "path",
    "change per step",
    "jerk [1/s^3]",
)


def delay_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table of latency in the loop, by decoder and delay."""
    rows = sorted(
        report["decoders"].items(), key=lambda item: (item[1]["delay_of"], item[1]["delay_steps"])
    )

    def motion(entry: Mapping[str, Any]) -> Iterator[str]:
        steps = entry["steps_mean_of_successes"]
        yield _MISSING if steps is None else f"{steps / report['fps']:.1f}"
        for name in ("path", "action_rate", "jerk"):
            value = entry.get(f"{name}_mean_of_successes")
            yield _MISSING if value is None else f"{value:.3g}"

    return [
        (name, str(entry["delay_steps"]), success_cell(entry), *motion(entry))
        for name, entry in rows
    ]


PAIRED = (
    "Difference of the success rates in percentage points (Newcombe's paired interval); "
    "episodes that only one of the two solved."
)
PAIRED_COLUMNS = (
    "decoder",
    "against",
    "points [95 %]",
    "only this : only reference",
    "sign test p",
)


def markdown(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Return the contents of ``report.md``; `figures` are images for its end, relative to it."""
    parts = [f"# Evaluation on {report['env']}", ""]
    if not report["complete"]:
        parts += [
            (
                "**Partial: the evaluation was interrupted; only the episodes that finished are "
                "counted.**"
            ),
            "",
        ]
    columns = tuple(column.replace("\n", " ").replace(" -up", "-up") for column in COLUMNS)
    parts += [
        _conditions(report),
        "",
        markdown_table(columns, table_rows(report)),
        "",
        *(f"- {note}" for note in NOTES),
    ]
    header, rows = _by_decoder(report, "per_task", success_cell)
    if len(header) > 1:
        parts += ["", "## Success by task", "", markdown_table(header, rows)]
    if pairs := paired_rows(report):
        parts += [
            "",
            "## Paired comparison on common seeds",
            "",
            PAIRED,
            "",
            markdown_table(PAIRED_COLUMNS, pairs),
        ]
    if any(entry.get("delay_steps") for entry in report["decoders"].values()):
        parts += [
            "",
            "## Latency in the loop",
            "",
            DELAYS,
            "",
            markdown_table(DELAY_COLUMNS, delay_rows(report)),
        ]
    ends = _by_decoder(report, "exit_reasons", lambda count: str(count or 0))
    parts += ["", "## How the chunks ended", "", markdown_table(*ends), ""]
    parts += [f"![{Path(figure).stem}]({figure})\n" for figure in figures]
    parts.append(f"*{report.get('program', MADE_BY)}*\n")
    return "\n".join(parts)


def console_table(report: Mapping[str, Any], width: int = 120) -> Table:
    """The main table for a terminal of `width` characters; columns that do not fit are left out."""
    rows = table_rows(report)
    heads = [max(column.split("\n"), key=len) for column in COLUMNS]
    widths = [3 + max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    shown = len(COLUMNS)
    while shown > 2 and sum(widths[:shown]) > width:
        shown -= 1
    state = "" if report["complete"] else " (partial: interrupted)"
    title = f"{report['env']}, {report['task']}, {_seed_range(report)}{state}"
    table = Table(title=title, header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(COLUMNS[:shown]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row[:shown])
    return table


def cells(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of `COLUMNS`, with `_MISSING` for what was not measured."""

    def filled(form: str) -> str:
        try:
            return form.format(**entry)
        except KeyError:
            return _MISSING

    agreed = entry.get("equal_to_ar")
    return (
        name,
        success_cell(entry),
        filled("{forwards_mean:.2f} / {forwards_p95:.0f}"),
        filled("{block_layers_mean:.2f} + {prefix_layers_mean:.2f}"),
        filled("{total_ms[p50]:.1f} / {total_ms[p95]:.1f} / {total_ms[p99]:.1f}"),
        filled("{control_rate_hz:.0f}"),
        filled("{speedup_vs_ar:.1f}x"),
        filled("{decode_speedup_vs_ar:.1f}x"),
        # Truncated, not rounded: only full agreement is shown as 100 %.
        (
            _MISSING
            if agreed is None
            else "100 %"
            if agreed == 1
            else f"{int(1000 * agreed) / 10:.1f} %"
        ),
    )


def success_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return _MISSING
    low, high = (100 * end for end in entry["success_ci95"])
    rate = (
        f"{100 * entry['success_rate']:.1f} % [{low:.0f}, {high:.0f}]"
        if entry["episodes"]
        else _MISSING
    )
    return f"{entry['success']}/{entry['episodes']} = {rate}"


def _conditions(report: Mapping[str, Any]) -> str:
    hardware = report["hardware"]
    timing = report.get("timing")
    seeds = report["seeds"]
    models = [
        f"{role} {report[role]['name']} ({report[role]['sha256']})"
        for role in ("policy", "teacher")
        if report[role]
    ]
    episodes = counted(seeds["count"], "episode")
    split = f", split {report['split']}" if report["split"] else ""
    lines = [
        (
            f"- Task {report['task']}{split}, {episodes} per decoder, {_seed_range(report)}"
            f"{_shard(report)}; "
            f"{report['executed_steps']} of {report['chunk_size']} steps of a chunk are executed "
            "before the next one."
        ),
        f"- Checkpoints: {', '.join(models)}.",
        (
            f"- Machine: {hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']} GB; "
            f"device {hardware['device']}, {counted(hardware['threads'], 'thread')} of torch."
        ),
        "- Versions: "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
    ]
    if timing:
        chunks = counted(timing["chunks"], "consecutive chunk")
        episodes = counted(timing["episodes"], "closed-loop episode")
        lines.append(
            f"- Latency: {chunks} from {episodes} of {timing['driver']}, each decoder warm-started "
            "from its own previous chunk."
        )
    return "\n".join(lines)


def _shard(report: Mapping[str, Any]) -> str:
    """Which part of these episodes a report has, if not all."""
    return "" if "shard" not in report else " (shard {} of {} alone)".format(*report["shard"])


def _seed_range(report: Mapping[str, Any]) -> str:
    first = report["seeds"]["first"]
    count = report["seeds"]["count"]
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
