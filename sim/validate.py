"""Success of a checkpoint on a range of seeds, a JSON line an episode: `python -m sim.validate --policy_path P ...`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

from lerobot.envs.configs import EnvConfig

from ceed_vla.checkpoints import load
from ceed_vla.cli import Command, run
from ceed_vla.fields import COUNTS, SEEDS, check_fields, ranged
from sim.environment import VALIDATION_SEED, turns
from sim.rollout import rollout
from sim.tabletop.lerobot_env import mixed_tabletop


@dataclass
class ValidateConfig:
    """Success of a checkpoint on a range of seeds.

    Attributes:
        policy_path: Checkpoint folder.
        seed: First seed.
        episodes: Number of episodes.
        decoding: Decoder.
        env: The environment.
    """

    policy_path: str = ""
    seed: int = ranged(VALIDATION_SEED, SEEDS)
    episodes: int = ranged(40, COUNTS)
    decoding: str = "ceed"
    env: EnvConfig = field(default_factory=mixed_tabletop)

    def __post_init__(self) -> None:
        check_fields(self, "--")


def validate(config: ValidateConfig) -> None:
    """Run the episodes; prints ``{"success": ..., "seed": ..., "task": ...}`` for each as it ends."""
    seeds, tasks = range(config.seed, config.seed + config.episodes), turns(config.env)
    rollout(
        load(config.policy_path), seeds, config.env, tasks=[tasks[seed % len(tasks)] for seed in seeds],
        decoding=config.decoding,
        on_episode=lambda e: print(json.dumps({"success": e.success, "seed": e.seed, "task": e.task}), flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    command = Command("", "sim.validate", "ValidateConfig", "validate", "no report is kept")
    raise SystemExit(run("validate", command, sys.argv[1:]))
