r"""Table and plot of what `recipes/libero_harness.sh` measured with vla-eval.

It copies each run's own result file, which it does not change otherwise, and plots the success of
live episodes against the latency of a chunk:

    python -m benchmarks.harness.results --runs outputs/libero/harness --output docs/reports/libero
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ceed_vla.errors import ConfigError
from ceed_vla.sim.paired import compare_paired
from ceed_vla.sim.plots import GREY, INK, STYLE, VERMILLION, save_figure
from ceed_vla.sim.success import success_entry

EPISODE = re.compile(
    r"Episode done: (?P<steps>\d+) steps .*stale=(?P<stale>\d+)%.*env\.step mean=[\d.]+ms "
    r"max=(?P<slowest>[\d.]+)ms"
)


@dataclass
class ResultsConfig:
    """What to read and where to write."""

    runs: Path  # folder of the runs of recipes/libero_harness.sh
    output: Path  # folder of the copies and of the plot
    reference: str = ""  # name of the run to which others are compared, episode by episode


@dataclass(frozen=True)
class Run:
    """One run of the recipe.

    Attributes:
        name: Its name.
        mode: "sync" or "live".
        decoding: Name of the decoding.
        slower: Factor of the slow motion.
        latency_ms: Least time of a chunk [ms], in the time of the robot.
        engine: Engine that decoded.
        solved: (task, number of the episode) -> whether it was solved.
        steps: Steps of the solved episodes.
        errors: Episodes that ended by an error; they count as failures.
        stale: Steps of live episodes without a new action, in percent of an episode.
        late: Episodes with a step that took longer than its period.
    """

    name: str
    mode: str
    decoding: str
    slower: float
    latency_ms: float
    engine: str
    solved: dict[tuple[str, int], bool]
    steps: list[int]
    errors: int
    stale: list[int]
    late: int


def read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """Read a run and the result file that vla-eval exported.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    exported = sorted(folder.glob("*_aggregate.json"))
    if not exported or not (folder / "arguments").is_file():
        raise ConfigError(f"{folder} holds no exported run of recipes/libero_harness.sh.")
    result = json.loads(exported[0].read_text())
    mode, _, decoding, _, slower, latency, engine = (folder / "arguments").read_text().split()
    solved: dict[tuple[str, int], bool] = {}
    steps, errors = [], 0
    for task in result["tasks"]:
        for episode in task["episodes"]:
            success = bool(episode["metrics"].get("success"))
            solved[task["task"], int(episode["episode_id"])] = success
            errors += bool(episode.get("failure_reason"))
            if success:
                steps.append(int(episode["steps"]))
    log = "".join(file.read_text() for file in sorted(folder.glob("shard*.log")))
    live = [match.groupdict() for match in EPISODE.finditer(log)] if mode == "live" else []
    period_ms = 1000 / 20 * float(slower)
    run = Run(
        name=folder.name,
        mode=mode,
        decoding=decoding,
        slower=float(slower),
        latency_ms=float(latency),
        engine=engine,
        solved=solved,
        steps=steps,
        errors=errors,
        stale=[int(episode["stale"]) for episode in live],
        late=sum(float(episode["slowest"]) > period_ms for episode in live),
    )
    return run, result


def table(runs: Sequence[Run], reference: Run | None) -> str:
    """Markdown table of the runs."""
    lines = [
        "| run | how | success [95 %] | against the reference, points [95 %] | steps, p50 "
        "| stale steps, mean; episodes with a late step | errors |",
        "|" + " -- |" * 7,
    ]
    for run in runs:
        entry = success_entry(run.solved.values())
        low, high = (100 * bound for bound in entry["success_ci95"])
        paired = ""
        if reference is not None and run is not reference:
            numbers = {key: index for index, key in enumerate(sorted(reference.solved))}
            both = compare_paired(
                {numbers[key]: value for key, value in run.solved.items() if key in numbers},
                {numbers[key]: value for key, value in reference.solved.items()},
            )
            paired = "{:+.1f} [{:+.1f}, {:+.1f}], {} episodes".format(
                both["difference_points"], *both["ci95_points"], both["episodes"]
            )
        live = run.mode == "live"
        how = [run.mode, run.decoding, run.engine]
        if live:
            how += [f"{run.latency_ms:g} ms", f"slower by {run.slower:g}"]
        cells = [
            run.name,
            ", ".join(how),
            f"{entry['success']} of {entry['episodes']} [{low:.0f}, {high:.0f}]",
            paired,
            f"{np.median(run.steps):.0f}" if run.steps else "",
            f"{np.mean(run.stale):.0f} %; {run.late}" if run.stale else "",
            str(run.errors),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def live_figure(runs: Sequence[Run]) -> Figure:
    """Success of live episodes against the latency of a chunk."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, color, marker in (("ceed", VERMILLION, "o"), ("ar", GREY, "s")):
        own = sorted(
            (run for run in runs if run.mode == "live" and run.decoding == name),
            key=lambda run: run.latency_ms,
        )
        if not own:
            continue
        entries = [success_entry(run.solved.values()) for run in own]
        rates = np.array([100 * entry["success_rate"] for entry in entries])
        bounds = np.array([[100 * bound for bound in entry["success_ci95"]] for entry in entries])
        axes.errorbar(
            [run.latency_ms for run in own],
            rates,
            yerr=np.abs(bounds.T - rates),
            color=color,
            marker=marker,
            capsize=4,
            label={"ceed": "early exit", "ar": "token by token"}[name],
        )
    axes.set(
        xlabel="latency of a chunk [ms]; whiskers: 95 % Wilson intervals",
        ylabel="episodes solved [%]",
        ylim=(0, 103),
        title="LIBERO-object when the world does not wait",
    )
    axes.grid(axis="y", color="#DDE1E6")
    axes.tick_params(colors=INK)
    axes.legend(frameon=False)
    return figure


def main(config: ResultsConfig) -> None:
    """Copy the result files, print the table and draw the plot."""
    found = [
        read_run(file.parent)
        for file in sorted(config.runs.glob("*/arguments"))
        if list(file.parent.glob("*_aggregate.json"))
    ]
    if not found:
        raise ConfigError(f"{config.runs} holds no finished run of recipes/libero_harness.sh.")
    runs = [run for run, _ in found]
    config.output.mkdir(parents=True, exist_ok=True)
    for run, result in found:
        (config.output / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    reference = next((run for run in runs if run.name == config.reference), None)
    if config.reference and reference is None:
        raise ConfigError(
            f"--reference is {config.reference!r}; choose one of "
            f"{', '.join(run.name for run in runs)}."
        )
    print(table(runs, reference))
    if any(run.mode == "live" for run in runs):
        with mpl.rc_context(STYLE):
            save_figure(live_figure(runs), config.output / "live.png")


if __name__ == "__main__":
    main(draccus.parse(ResultsConfig))
