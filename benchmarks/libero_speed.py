"""Control steps per second in LIBERO, with and without images, beside LeRobot's environment.

    python -m benchmarks.libero_speed --steps 40

Each row runs the same official episode; images have 256 x 256 pixels and both cameras. "every 4th
step" is a policy that executes four steps of each chunk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module

import numpy as np
from rich.console import Console
from rich.table import Table

from ceed_vla.sim.libero.env import LiberoTasks
from ceed_vla.sim.libero.installation import libero
from ceed_vla.sim.libero.scene import NO_MOTION

SUITE, TASK = "libero_object", "libero_object/0"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=40, help="control steps per row")
    steps = parser.parse_args().steps
    if steps < 1 or steps % 8:
        parser.error("--steps must be a multiple of 8, as a row renders every 8th step")
    libero()
    action = np.array(NO_MOTION)
    lerobot = import_module("lerobot.envs.libero")
    theirs = lerobot.LiberoEnv(lerobot._get_suite(SUITE), 0, SUITE, obs_type="pixels_agent_pos")
    theirs.reset(seed=0)
    # Before ours: its renderer does not make its own GL context the current one.
    seconds = {"LeRobot's environment": timed(lambda: theirs.step(action), steps)}
    theirs.close()
    for quality in ("official", "fast"):
        env = LiberoTasks([TASK], quality=quality)
        env.reset(seed=0)
        for every in (1, 4, 8):
            name = f"ours, {quality}, " + ("every step" if every == 1 else f"every {every}th step")
            seconds[name] = timed(seen_every(env, every, action), steps)
    seconds["ours, no image"] = timed(lambda: env.advance(action), steps)
    table = Table("images", "steps per second", "ratio", title=f"{TASK}, one process")
    least = seconds["LeRobot's environment"]
    for name, took in seconds.items():
        table.add_row(name, f"{steps / took:.1f}", f"{least / took:.1f}")
    Console().print(table)


def timed(step: Callable[[], object], steps: int) -> float:
    """Time of `steps` steps, after one that is not counted [s]."""
    step()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - begin


def seen_every(env: LiberoTasks, every: int, action: np.ndarray) -> Callable[[], object]:
    """A step of `env` that renders both cameras in every `every`th call."""
    count = 0

    def step() -> None:
        nonlocal count
        env.advance(action)
        count += 1
        if count % every == 0:
            env.observe()

    return step


if __name__ == "__main__":
    main()
