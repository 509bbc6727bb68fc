"""Episodes of a scripted policy, and files of evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig

from ceed_vla.sim.env_tasks import turns
from ceed_vla.sim.environment import EnvPool, joined
from ceed_vla.sim.episode_log import EPISODES
from ceed_vla.sim.evaluate import EvalConfig
from ceed_vla.sim.rollout import EpisodeResult, PolicyRunner, rollout
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import CeedTabletopEnv


def run_seeds(
    policy: Any, seeds: Iterable[int], env: EnvConfig, batch: int = 20, **options: Any
) -> list[EpisodeResult]:
    """Run episodes of rising `seeds`, cycling the tasks; `options` are the runner's."""
    tasks = turns(env)
    with EnvPool(batch, env) as pool:
        runner = PolicyRunner(joined((policy, None, None), env), **options)
        episodes = [(seed, tasks[i % len(tasks)]) for i, seed in enumerate(seeds)]
        return in_order(rollout(runner, pool, episodes))


def in_order(results: Iterable[EpisodeResult]) -> list[EpisodeResult]:
    """Results by their seeds."""
    return sorted(results, key=lambda result: result.seed)


def short_evaluation(checkpoint: Path, folder: Path, **changes: Any) -> EvalConfig:
    """Options of an evaluation that takes a second."""
    env = CeedTabletopEnv(task="push_cube", episode_length=8)
    config = EvalConfig(CheckpointPath(str(checkpoint)), env=env, output_dir=str(folder), threads=1)
    short = {"decoders": "ceed", "episodes": 2, "timing_chunks": 0, "clips": False}
    return replace(config, **{**short, **changes})


def episodes_of(folder: Path) -> list[str]:
    """Sorted lines without the checksums, which depend on the order of writing."""
    return sorted(
        re.sub(r', "check": "\w+"', "", line)
        for line in (folder / EPISODES).read_text().splitlines()
    )


def as_of_before(folder: Path) -> None:
    """Rewrite the episodes in the format of earlier versions, without checksums."""
    first, *lines = (folder / EPISODES).read_text().splitlines()
    header = {name: value for name, value in json.loads(first).items() if name != "chained"}
    plain = [re.sub(r', "check": "\w+"', "", line) for line in lines]
    (folder / EPISODES).write_text("\n".join([json.dumps(header), *plain, ""]))
