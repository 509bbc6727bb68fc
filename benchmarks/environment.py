"""How fast the simulated table steps: control steps per second of processor time, without and with cameras.

    python benchmarks/environment.py

Every step is drawn at random and followed by its observation, as in an evaluation that replans after every step; at an
episode's end the next seed follows. Processor time counts all threads, also those of a software renderer.
"""

from __future__ import annotations

import argparse
import time

import gymnasium
import numpy as np

from sim.tabletop import ENV_ID
from sim.tabletop.env import CTRL_DT


def rate(steps: int, seed: int, cameras: bool) -> tuple[float, float]:
    """Control steps per second of processor and of wall time."""
    options = {"task": "mixed"} if cameras else {"task": "mixed", "cameras": ()}
    env = gymnasium.make(ENV_ID, **options)
    env.action_space.seed(seed)
    env.reset(seed=seed)
    env.step(env.action_space.sample())  # the renderer's start does not count
    wall, processor = time.perf_counter(), time.process_time()
    for step in range(steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset(seed=seed + step)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    env.close()
    return steps / processor, steps / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="control steps of each of the repetitions")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=20_000)
    arguments = parser.parse_args()
    for cameras in (False, True):
        rates = [rate(arguments.steps, arguments.seed, cameras) for _ in range(arguments.repetitions)]
        processor, wall = np.array(rates).T
        print(
            f"{'two cameras' if cameras else 'no cameras':<12} {np.median(processor):6.0f} steps per processor second "
            f"({processor.min():.0f} to {processor.max():.0f}), {np.median(wall):6.0f} per second, "
            f"{np.median(wall) * CTRL_DT:4.0f} x real time"
        )


if __name__ == "__main__":
    main()
