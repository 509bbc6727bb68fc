"""Episodes that go on from the same state of the simulator in several ways."""

from __future__ import annotations

from dataclasses import replace

from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.rollout import Episode

# methods of the unwrapped environment
NEEDED = ("snapshot", "restore", "observe", "advance", "is_success")


def branched(episode: Episode, pool: EnvPool, slot: int) -> Episode:
    """Copy an episode into the environment of a slot."""
    env = pool.env(slot)
    env.follow(episode.env)
    result = replace(
        episode.result, forwards=[], exit_reasons=[], block_layers=[], prefix_layers=[], seconds=[]
    )
    return replace(episode, env=env, result=result, actions=[*episode.actions])
