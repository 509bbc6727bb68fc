"""LeRobot's real-time chunking against its synchronous inference, at delays of 0 to 4 control steps.

    python benchmarks/real_time_chunking.py --episodes 40

Time is the simulator's: a chunk is ready a given number of control steps after its observation, whatever this machine
needs for it. `sync` holds the arm meanwhile, as `--inference.type=sync` does; `rtc` goes on with LeRobot's own
`ActionQueue` and hands over what `--inference.type=rtc --inference.queue_threshold=<left>` does: a new chunk is asked
for as soon as that many actions are left. The seam is the largest joint step [rad] of the command where a new chunk
takes over, over the largest inside chunks.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import torch
from lerobot.policies.rtc import ActionQueue
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.rollout.inference.rtc import _normalize_prev_actions_length
from numpy.typing import NDArray
from tqdm import tqdm

from ceed_vla.checkpoints import load
from sim.environment import VALIDATION_SEED, Bundle, Environment, joined, observation_batch
from sim.rollout import wilson_interval
from sim.tabletop.lerobot_env import mixed_tabletop

DELAYS = range(5)


class Driver:
    """Drives an arm through one episode, as one of LeRobot's inference engines does.

    Args:
        bundle: Policy and processors.
        delay: Control steps from an observation to its chunk.
        real_time: Whether the arm goes on meanwhile.
        threshold: Actions that are left when the next chunk is asked for.
    """

    def __init__(self, bundle: Bundle, delay: int, real_time: bool, threshold: int) -> None:
        self.policy, self.pre, self.post = bundle
        self.delay, self.real_time = delay, real_time
        self.horizon, self.threshold = RTCConfig().execution_horizon, threshold if real_time else 0
        self.seams: list[float] = []
        self.inside: list[float] = []

    def episode(self, env: Environment, seed: int) -> bool:
        """Whether the episode of `seed` is solved."""
        env.reset(seed)
        self.policy.reset()
        queue = ActionQueue(RTCConfig(enabled=self.real_time))
        chunk, ready, taken = None, 0, 0
        fresh = False  # whether the next action is the first of a new chunk
        for step in range(env.max_episode_steps):
            if chunk is None and queue.qsize() <= self.threshold:
                chunk, ready, taken = self.decode(env, queue), step + self.delay, queue.get_action_index()
            if chunk is not None and step >= ready:
                kept = chunk if self.real_time else chunk[:, : self.policy.config.n_action_steps]
                queue.merge(kept[0], self.post(kept)[0], self.delay if self.real_time else 0, taken)
                chunk, fresh = None, True
            action = queue.get()
            before = env.inner.data.ctrl[:7].copy()
            solved = env.advance(env.hold_action() if action is None else action.cpu().numpy())
            if action is not None:
                self.note(env.inner.data.ctrl[:7] - before, fresh)
                fresh = False
            if solved:
                return True
        return False

    def note(self, moved: NDArray[np.float64], seam: bool) -> None:
        """One joint step (7,) of the command [rad]."""
        (self.seams if seam else self.inside).append(float(np.abs(moved).max()))

    def decode(self, env: Environment, queue: ActionQueue) -> torch.Tensor:
        """A chunk (1, m, A) for what the cameras see now."""
        batch = self.pre(observation_batch([env.observe()], [env.instruction]))
        left = queue.get_left_over() if self.real_time else None
        if left is not None:
            left = _normalize_prev_actions_length(left, self.horizon)
        return self.policy.predict_action_chunk(batch, inference_delay=self.delay, prev_chunk_left_over=left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy_path", default="student")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=VALIDATION_SEED)
    parser.add_argument("--delays", type=int, nargs="+", default=list(DELAYS))
    parser.add_argument("--queue_threshold", type=int, default=RTCInferenceConfig().queue_threshold)
    options = parser.parse_args()
    logging.getLogger(ActionQueue.__module__).setLevel(logging.ERROR)  # it warns when its first chunk came late
    config = mixed_tabletop()
    bundle: Any = joined(load(options.policy_path), config)
    env = Environment(config)
    seeds = range(options.seed, options.seed + options.episodes)
    print(f"{options.policy_path}, seeds {seeds.start}-{seeds.stop - 1}, {config.fps} Hz, mixed tabletop")
    print("| delay | engine | solved | 95 % | largest step seam / inside [rad] | ratio | p95 seam / inside | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for delay in options.delays:
        for real_time in (False, True):
            driver = Driver(bundle, delay, real_time, options.queue_threshold)
            name = "rtc" if real_time else "sync"
            solved = sum(driver.episode(env, seed) for seed in tqdm(seeds, desc=f"{name} {delay}", leave=False))
            low, high = wilson_interval(solved, len(seeds))
            parts = []
            for level in (100, 95):
                seam, inside = (
                    float(np.percentile(steps, level)) if steps else np.nan for steps in (driver.seams, driver.inside)
                )
                parts.append(f"{seam:.3f} / {inside:.3f} | {seam / inside:.2f}")
            print(f"| {delay} | {name} | {solved} | {low:.0%}-{high:.0%} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
