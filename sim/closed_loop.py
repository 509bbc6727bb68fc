"""One episode at batch 1, chunk by chunk: for clips, pictures and the observations of the timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sim.rollout import Chunk, EnvPool, PolicyRunner


@dataclass
class Replan:
    """A moment at which a new chunk was decoded, and what followed until the next one.

    Attributes:
        observation: As the environment gave it.
        instruction: The episode's instruction.
        previous: Tokens (n,) of the chunk before; None at the start.
        chunk: The decoded chunk.
        step: Control steps done before this chunk.
        views: ``pixels`` after each executed step.
        success: Whether the episode was solved while this chunk ran.
        finished: Whether the episode ended.
    """

    observation: dict[str, Any]
    instruction: str
    previous: Tensor | None
    chunk: Chunk
    step: int
    views: list[dict[str, np.ndarray]]
    success: bool
    finished: bool


def drive(
    runner: PolicyRunner,
    pool: EnvPool,
    seed: int,
    executed_steps: int,
    task: str = "mixed",
) -> Iterator[Replan]:
    """Run one episode, the same as `sim.rollout.rollout` does, and yield every replan after its steps.

    Args:
        runner: Policy and decoding.
        pool: Environments, of which the first is used, and their step limit.
        seed: Seed of the episode.
        executed_steps: Steps ``h`` of each chunk that are executed.
        task: A family, or "mixed" for the environment's own draw.

    Yields:
        One `Replan` a chunk.
    """
    env, limit = pool.env(0), pool.max_episode_steps
    observation, _ = env.reset(seed=seed, options={} if task == "mixed" else {"task": task})
    instruction = str(env.instruction)
    previous, step, success = None, 0, False
    while not success and step < limit:
        start = observation
        chunk = runner.decode([start], [instruction], [previous])[0]
        views: list[dict[str, np.ndarray]] = []
        for action in chunk.first_actions(env, min(executed_steps, limit - step)):
            env.advance(action)
            success = env.is_success()
            observation = env.observe()
            views.append(observation["pixels"])
            if success:
                break
        finished = success or step + len(views) >= limit
        yield Replan(start, instruction, previous, chunk, step, views, success, finished)
        previous, step = chunk.warm_start, step + len(views)
