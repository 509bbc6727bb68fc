"""Episodes that go on from the same state of the simulator in several ways."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lerobot.envs.configs import EnvConfig

from ceed_vla.fields import ranged
from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.rollout import Episode
from ceed_vla.sim.tabletop.lerobot_env import mixed_tabletop
from ceed_vla.workers import MOST, ClusterConfig

# methods of the unwrapped environment
NEEDED = ("snapshot", "restore", "observe", "advance", "is_success")


@dataclass
class BranchingSimulation:
    """Simulator flags of a command whose episodes branch.

    Attributes:
        env: Environment of the episodes; must have ``snapshot`` and the methods listed with it in
            `ceed_vla.sim.environment`.
        workers: Processes that share the episodes.
        cluster: Ray cluster that runs the episodes instead.
    """

    env: EnvConfig = field(default_factory=mixed_tabletop)
    workers: int = ranged(2, MOST)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def branched(episode: Episode, pool: EnvPool, slot: int) -> Episode:
    """Copy an episode into the environment of a slot."""
    env = pool.env(slot)
    env.follow(episode.env)
    result = replace(
        episode.result, forwards=[], exit_reasons=[], block_layers=[], prefix_layers=[], seconds=[]
    )
    return replace(episode, env=env, result=result, actions=[*episode.actions])
