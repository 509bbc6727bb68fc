"""Episodes of a scripted policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lerobot.envs.configs import EnvConfig

from sim.environment import EnvPool, joined, turns
from sim.rollout import EpisodeResult, PolicyRunner, rollout


def run_seeds(
    policy: Any, seeds: Iterable[int], env: EnvConfig, batch: int = 20, **options: Any
) -> list[EpisodeResult]:
    """Episodes of `seeds`, whose tasks take turns; `options` are the runner's."""
    tasks = turns(env)
    with EnvPool(batch, env) as pool:
        runner = PolicyRunner(joined((policy, None, None), env), **options)
        return rollout(runner, pool, [(seed, tasks[i % len(tasks)]) for i, seed in enumerate(seeds)])
