"""Vector environments of our environments, as LeRobot's tools expect them: one suite per task."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.envs.utils import freeze_after_episode_end


def suites(
    makers: dict[str, Any], n_envs: int, use_async_envs: bool
) -> dict[str, dict[int, VectorEnv]]:
    """Build {task: {0: vector env}} for LeRobot's tools, from the factory of each task.

    LeRobot reports success per suite, so each task is a suite. Finished sub-environments are frozen
    and cost nothing.
    """
    vector: Any = SyncVectorEnv
    if use_async_envs and n_envs > 1:
        vector = partial(AsyncVectorEnv, context="forkserver")
    return {
        task: {
            0: vector(
                [freeze_after_episode_end(make)] * n_envs, autoreset_mode=AutoresetMode.NEXT_STEP
            )
        }
        for task, make in makers.items()
    }


def suite_per_task(
    config: Any, n_envs: int, use_async_envs: bool
) -> dict[str, dict[int, VectorEnv]]:
    """`suites` of a configuration whose environment takes a list of `tasks`: one for each task."""
    make = partial(gymnasium.make, config.gym_id, disable_env_checker=True)
    makers = {
        task: partial(make, **{**config.gym_kwargs, "tasks": [task]}) for task in config.tasks()
    }
    return suites(makers, n_envs, use_async_envs)
