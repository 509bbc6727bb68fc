"""How many sampled initial states of each task LIBERO's scripted expert solves.

    python -m benchmarks.libero_expert --suite libero_object --states 20

No image is rendered but that of the first observation. Seeds are those of choices, from 40000 up.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ceed_vla.sim.libero.env import LiberoTasks
from ceed_vla.sim.libero.tasks import HORIZONS, WITH_EXPERT, tasks_of
from ceed_vla.sim.seeds import VALIDATION_SEED
from ceed_vla.sim.success import success_entry


def main() -> None:
    """Run the expert, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--suite", default="libero_object", choices=WITH_EXPERT)
    parser.add_argument("--states", type=int, default=20, help="initial states per task")
    arguments = parser.parse_args()
    table = Table("task", "instruction", "solved", "steps, median", title="scripted expert")
    every: list[bool] = []
    for task in tasks_of(arguments.suite):
        env = LiberoTasks([task], states="sampled", quality="fast", image_size=16)
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + arguments.states)
        steps = [run(env, seed, HORIZONS[arguments.suite]) for seed in track(seeds, task)]
        instruction = env.task_description
        env.close()
        solved = [count for count in steps if count is not None]
        every += [count is not None for count in steps]
        median = f"{np.median(solved):.0f}" if solved else ""
        table.add_row(task, instruction, f"{len(solved)} of {len(steps)}", median)
    entry = success_entry(every)
    low, high = (100 * bound for bound in entry["success_ci95"])
    table.caption = f"{entry['success']} of {entry['episodes']} [{low:.0f}, {high:.0f} %]"
    Console().print(table)


def run(env: LiberoTasks, seed: int, limit: int) -> int | None:
    """Steps until the expert solves the episode of a seed; None if it does not within `limit`."""
    env.reset(seed=seed)
    for step in range(limit):
        env.advance(env.expert_action())
        if env.is_success():
            return step + 1
    return None


if __name__ == "__main__":
    main()
