r"""Table and plot of what `recipes/libero_harness.sh` measured with vla-eval.

It copies each run's own result file, and plots the success of live episodes against the latency of
a chunk. With `--own`, folders of `ceed-vla eval` on the same initial states, it compares them
episode by episode, and plots the rows with delays:

    python -m benchmarks.harness.results --runs outputs/libero/harness --output docs/reports/libero
"""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.sim.episode_log import EPISODES, read_identity
from ceed_vla.sim.libero.lerobot_env import CeedLiberoEnv
from ceed_vla.sim.paired import compare_paired
from ceed_vla.sim.plots import BLUE, GREY, INK, STYLE, VERMILLION, save_figure
from ceed_vla.sim.success import success_entry

LATE = 1.05  # a tick is late if it takes so many of its periods; the clock never ends one early
STATES = 50  # of a task; our seeds go through the tasks, then the states
FPS = 20
Key = tuple[str, int]  # instruction, number of the official initial state


@dataclass
class ResultsConfig:
    """What to read and where to write."""

    runs: Path  # folder of the runs of recipes/libero_harness.sh
    output: Path  # folder of the copies and of the plot
    reference: str = ""  # name of the run to which others are compared, episode by episode
    # folders of our own evaluation, separated by commas
    own: str = ""


@dataclass(frozen=True)
class Run:
    """One run of the recipe.

    Attributes:
        name: Its name.
        options: Its arguments by name: mode, checkpoint, weights (a hash), decoding, episodes,
            tasks, slower, latency_ms and engine.
        solved: Whether an episode was solved.
        errors: Episodes that ended by an error; they count as failures.
        held: Ticks of a live episode without a new action, in percent of its steps.
        late: Live episodes in which a tick took longer than its period.
        steps: Control steps of every solved episode.
        actions: The actions of an episode.
    """

    name: str
    options: Mapping[str, str]
    solved: dict[Key, bool] = field(default_factory=dict)
    errors: int = 0
    held: list[float] = field(default_factory=list)
    late: int = 0
    steps: list[int] = field(default_factory=list)
    actions: dict[Key, list[list[float]]] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.options["mode"] == "live"

    @property
    def latency_ms(self) -> float:
        """Least time of a chunk [ms], in the time of the robot."""
        return float(self.options["latency_ms"])


@dataclass(frozen=True)
class OwnRow:
    """One row of our own evaluation.

    Attributes:
        solved: Whether an episode was solved.
        steps: Control steps of every solved episode, where they are known.
        delay: Control steps that passed while a chunk was decoded.
    """

    solved: dict[Key, bool] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    delay: int = 0


def result_file(folder: Path) -> Path | None:
    """The file that vla-eval exported of a run, if it has finished."""
    return next(iter(sorted(folder.glob("*_aggregate.json"))), None)


def read_run(folder: Path) -> Run:
    """Read a run of the recipe.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    exported, arguments = result_file(folder), folder / "arguments"
    if exported is None or not arguments.is_file():
        raise ConfigError(f"{folder} holds no exported run of recipes/libero_harness.sh.")
    options = read_options(folder)
    result = json.loads(exported.read_text())
    episodes = [(task["task"], episode) for task in result["tasks"] for episode in task["episodes"]]
    planned = int(options["tasks"]) * int(options["episodes"])
    if result.get("partial") or len(episodes) != planned:
        raise ConfigError(
            f"{folder} has {len(episodes)} of {planned} episodes; run the recipe again with the "
            "same arguments."
        )
    period_ms = 1000 / 20 * float(options["slower"])
    solved: dict[Key, bool] = {}
    held: list[float] = []
    steps: list[int] = []
    errors = late = 0
    for task, episode in episodes:
        metrics = episode["metrics"]
        solved[task, int(episode["episode_id"])] = bool(metrics["success"])
        errors += bool(episode.get("failure_reason"))
        if metrics["success"]:
            steps.append(int(episode["steps"]))
        if "holds" in metrics:
            held.append(100 * metrics["holds"] / episode["steps"])
            late += metrics["longest_tick_ms"] > LATE * period_ms
    return Run(folder.name, options, solved, errors, held, late, steps, read_actions(folder))


def read_options(folder: Path) -> dict[str, str]:
    """The arguments of a run by name."""
    lines = (folder / "arguments").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def read_actions(folder: Path) -> dict[Key, list[list[float]]]:
    """The recorded actions (7,) of every step of a run's episodes."""
    actions: dict[Key, list[list[float]]] = {}
    for file in folder.glob("recording-*.sqlite"):
        with closing(sqlite3.connect(file)) as database:
            rows = database.execute(
                "SELECT task_name, episode_id, fields FROM step_rows "
                "JOIN episode_results USING (sid, eid) ORDER BY sid, eid, step_id"
            )
            for task, episode, fields in rows:
                actions.setdefault((task, int(episode)), []).append(json.loads(fields)["action"])
    return actions


def read_own(folders: str) -> dict[str, OwnRow]:
    """The rows of our own evaluations on the official initial states, by name.

    Raises:
        ConfigError: A folder holds none, one with other initial states, or a row that an earlier
            folder has, too.
    """
    rows: dict[str, OwnRow] = {}
    for folder in map(Path, filter(None, folders.split(","))):
        identity = read_identity(folder)
        tasks = _number_of_tasks(folder, identity["env"])
        if known := sorted(rows.keys() & identity["decoders"].keys()):
            raise ConfigError(
                f"--own: {folder} has {known[0]}, as an earlier folder; leave one out."
            )
        for name, decoder in identity["decoders"].items():
            rows[name] = OwnRow(delay=decoder.get("delay", 0))
        for line in (folder / EPISODES).read_text().splitlines()[1:]:
            if not line.endswith("}"):  # an interrupt cut the last line
                break
            episode = json.loads(line)
            row = rows[episode["decoder"]]
            row.solved[episode["instruction"], episode["seed"] // tasks % STATES] = episode[
                "success"
            ]
            if episode["success"] and "steps" in episode:
                row.steps.append(episode["steps"])
    return {name: row for name, row in rows.items() if row.solved}  # an interrupt leaves some out


def _number_of_tasks(folder: Path, env: Sequence[str]) -> int:
    """Number of tasks of an evaluation, by the flags of its environment."""
    values = dict(flag.removeprefix("--env.").split("=", 1) for flag in env)
    kind = values.get("type")
    official = CeedLiberoEnv.states
    if kind != "ceed_libero" or values.get("states", official) != official:
        raise ConfigError(
            f"--own: {folder} is not of LIBERO's official initial states: {' '.join(env)}."
        )
    return len(CeedLiberoEnv(task=values.get("task", CeedLiberoEnv.task)).tasks())


def against(solved: Mapping[Key, bool], others: Mapping[Key, bool]) -> str:
    """The paired difference to other episodes with the same initial states, as text."""
    common = sorted(solved.keys() & others.keys())
    if not common:
        return "no common episode"
    both = compare_paired(
        {index: solved[key] for index, key in enumerate(common)},
        {index: others[key] for index, key in enumerate(common)},
    )
    return "{:+.1f} [{:+.1f}, {:+.1f}], {} episodes".format(
        both["difference_points"], *both["ci95_points"], both["episodes"]
    )


def success_text(solved: Mapping[Key, bool]) -> str:
    """Solved episodes with their 95 % interval."""
    entry = success_entry(solved.values())
    low, high = (100 * bound for bound in entry["success_ci95"])
    return f"{entry['success']} of {entry['episodes']} [{low:.0f}, {high:.0f}]"


def table(runs: Sequence[Run], reference: Run | None, own: Mapping[str, OwnRow]) -> str:
    """Markdown table of the runs."""
    lines = [
        "| run | how | success [95 %] | steps to success, median | against the reference, points "
        "[95 %] | against our own evaluation | mean of ticks that held, late episodes, errors |",
        "|" + " -- |" * 7,
    ]
    for run in runs:
        how = [run.options[name] for name in ("mode", "decoding", "engine")]
        if run.live:
            how += [f"{run.latency_ms:g} ms", f"slower by {run.options['slower']}"]
        paired = ""
        if reference is not None and run is not reference:
            paired = against(run.solved, reference.solved)
            common = run.actions.keys() & reference.actions.keys()
            equal = sum(run.actions[key] == reference.actions[key] for key in common)
            paired += f", {equal} with equal actions"
        decoding = run.options["decoding"]
        ours = same_decoder(own, decoding)
        cells = [
            run.name,
            ", ".join(how),
            success_text(run.solved),
            f"{np.median(run.steps):g}" if run.steps else "",
            paired,
            against(run.solved, ours.solved) if ours and not run.live else "",
            (f"{np.mean(run.held):.0f} % held, {run.late} late, " if run.live else "")
            + f"{run.errors} errors",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def same_decoder(own: Mapping[str, OwnRow], decoding: str) -> OwnRow | None:
    """Our own row of a decoder, of the policy or of its teacher.

    Raises:
        ConfigError: There is one of each.
    """
    found = [name for name in (decoding, f"teacher_{decoding}") if name in own]
    if len(found) > 1:
        raise ConfigError(
            f"--own has {found[0]} and {found[1]}, of two policies; evaluate one of them alone "
            "(--decoders only=...)."
        )
    return own[found[0]] if found else None


def delay_table(own: Mapping[str, OwnRow]) -> str:
    """Markdown table of our own rows with delays, each against the same decoder without one."""
    lines = ["| delay | success [95 %] | against no delay, points [95 %] | steps, mean |"]
    lines.append("|" + " -- |" * 4)
    for name, row in own.items():
        decoder, _, delay = name.partition("@")
        if delay:
            waits = own.get(decoder, OwnRow()).solved
            steps = f"{np.mean(row.steps):.0f}" if row.steps else ""
            cells = [name, success_text(row.solved), against(row.solved, waits), steps]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def live_figure(runs: Sequence[Run], own: Mapping[str, OwnRow]) -> Figure:
    """Success of live episodes, and the time they took, against the latency of a chunk.

    Beside them are our own episodes with delays.
    """
    curves: dict[str, list[tuple[float, Run | OwnRow]]] = {}
    several = len({run.options["checkpoint"] for run in runs if run.live}) > 1
    for run in runs:
        if run.live:
            name = {"ceed": "early exit", "ar": "token by token"}.get(run.options["decoding"])
            name = f"vla-eval, live: {name or run.options['decoding']}"
            if several:
                name += f" of {Path(run.options['checkpoint']).name}"
            curves.setdefault(name, []).append((run.latency_ms, run))
    for name, row in own.items():
        if name.partition("@")[0] == "ceed":
            milliseconds = 1000 * row.delay / FPS
            curves.setdefault("our own evaluation, delayed", []).append((milliseconds, row))
    figure = Figure(figsize=(7, 6), layout="constrained")
    success, time = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    looks = itertools.cycle(((GREY, "o"), (VERMILLION, "s"), (BLUE, "^"), (INK, "D")))
    for (name, points), (color, marker) in zip(sorted(curves.items()), looks, strict=False):
        points.sort(key=lambda point: point[0])
        latencies = [latency for latency, _ in points]
        entries = [success_entry(row.solved.values()) for _, row in points]
        rates = np.array([100 * entry["success_rate"] for entry in entries])
        bounds = np.array([[100 * bound for bound in entry["success_ci95"]] for entry in entries])
        counts = sorted({entry["episodes"] for entry in entries})
        success.errorbar(
            latencies,
            rates,
            yerr=np.abs(bounds.T - rates),
            color=color,
            marker=marker,
            capsize=4,
            label=f"{name} ({' or '.join(map(str, counts))} episodes a point)",
        )
        steps = [np.median(row.steps) if row.steps else np.nan for _, row in points]
        time.plot(latencies, steps, color=color, marker=marker)
    success.set(
        ylabel="episodes solved [%]",
        ylim=(0, 103),
        title="LIBERO-object when the world does not wait",
    )
    success.legend(frameon=False)
    time.set(
        xlabel="latency of a chunk [ms]; whiskers: 95 % Wilson intervals",
        ylabel="steps to success, median",
    )
    time.set_ylim(bottom=0)
    for axes in (success, time):
        axes.grid(axis="y", color="#DDE1E6")
        axes.tick_params(colors=INK)
    return figure


def main(config: ResultsConfig) -> None:
    """Copy the result files, print the table and draw the plot."""
    folders = [file.parent for file in sorted(config.runs.glob("*/arguments"))]
    runs = [read_run(folder) for folder in folders if result_file(folder)]
    if not runs:
        raise ConfigError(f"{config.runs} holds no finished run of recipes/libero_harness.sh.")
    reference = next((run for run in runs if run.name == config.reference), None)
    if config.reference and reference is None:
        raise ConfigError(
            f"--reference is {config.reference!r}; choose one of "
            f"{', '.join(run.name for run in runs)}."
        )
    own = read_own(config.own)
    config.output.mkdir(parents=True, exist_ok=True)
    for run in runs:
        file = result_file(config.runs / run.name)
        if file is not None:
            shutil.copy(file, config.output / f"{run.name}.json")
    print(table(runs, reference, own))
    if any("@" in name for name in own):
        print("", delay_table(own), sep="\n")
    if any(run.live for run in runs):
        with mpl.rc_context(STYLE):
            save_figure(live_figure(runs, own), config.output / "live.png")


if __name__ == "__main__":
    try:
        main(draccus.parse(ResultsConfig))
    except CeedVLAError as error:
        sys.exit(str(error))
