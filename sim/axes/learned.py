"""Serial groups: what becomes of an episode from every state of one decode path (S-GRPO, arXiv
2505.07686).

The states of a path are ordered, each what an exit would execute. So they are one group: all go on
from the same state of the simulator, and the same decoder drives each to the end of the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from typing import Any, ClassVar

import numpy as np
from lerobot.envs.configs import EnvConfig
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.axes.learned.rule import Group, Learned, features
from ceed_vla.checkpoints import load
from ceed_vla.decoding.exits import Seen
from ceed_vla.decoding.registry import register_exit
from ceed_vla.errors import ConfigError
from ceed_vla.fields import ranged
from ceed_vla.sim.environment import TAKEOVER_SEEDS, EnvPool, joined, observation_batch, turns
from ceed_vla.sim.rollout import (
    SHARD,
    Episode,
    PolicyRunner,
    episode_runner,
    execute,
    replan,
    stack_previous,
    tokens_per_step,
)
from ceed_vla.sim.tabletop.lerobot_env import mixed_tabletop
from ceed_vla.workers import MOST, Workers

Decision = tuple[int, str, int]  # seed, task, chunks before it
Outcome = tuple[str, int, str, bool, int]  # decoder, seed, task, whether it was solved, chunks


NEEDED = ("snapshot", "restore", "observe", "advance", "is_success")  # of the unwrapped environment


@register_exit("watched", "watched", "")
class Watched(Learned):
    """Ends no row."""

    reason = "watched"
    kept: ClassVar[list[NDArray[np.float64]]] = []  # (B, F) of every iteration of the last block

    def __init__(self) -> None:
        """It has no weights."""

    def ends(self, seen: Seen, measured: np.ndarray | None) -> NDArray[np.bool_]:
        assert measured is not None
        self.kept.append(features(seen, measured))
        return np.zeros(len(measured), dtype=bool)


@dataclass
class SerialGroups:
    """Rollouts for `ceed_vla.training.axes.learned`, shared by `workers` processes; `env` has
    ``snapshot`` and ``restore``.
    """

    env: EnvConfig
    workers: int = 2

    def outcomes(self, policy: str, decoders: Sequence[str], seeds: range) -> Iterator[Outcome]:
        """Whether each decoder solves each seed, and in how many chunks, as shards end."""
        low, high = TAKEOVER_SEEDS
        if not low <= seeds.start < seeds.stop <= high:
            raise ConfigError(
                f"--seed and --scouts give {seeds}; those for training are {low} to {high - 1}."
            )
        tasks = turns(self.env)
        with EnvPool(1, self.env) as pool:  # before the first episode
            pool.env(0).needs("reinforce", *NEEDED)
        plan = [(seed, tasks[i % len(tasks)]) for i, seed in enumerate(seeds)]
        with Workers(self.workers, episode_runner, policy, self.env) as workers:
            runs = [(decoder, shard) for shard in batched(plan, SHARD) for decoder in decoders]
            for (decoder, shard), found in zip(
                runs, workers.map((d, None, s) for d, s in runs), strict=True
            ):
                for result, (seed, task) in zip(found, shard, strict=True):
                    yield decoder, seed, task, result.success, len(result.forwards)

    def groups(
        self, policy: str, decoder: str, cap: int, decisions: Sequence[Decision]
    ) -> Iterator[Group]:
        """The group of every decision that an episode driven by `decoder` reaches, as shards
        end.
        """
        with Workers(self.workers, group_runner, policy, self.env, decoder, cap) as workers:
            for found in workers.map(batched(decisions, SHARD)):
                yield from found


@dataclass
class ReinforceSimulation:
    """The flags by which `reinforce` uses a simulator.

    Attributes:
        env: Where episodes run; it has ``snapshot`` and what goes with it, see
            `ceed_vla.sim.environment`.
        workers: Processes that share them.
    """

    env: EnvConfig = field(default_factory=mixed_tabletop)
    workers: int = ranged(2, MOST)

    def arguments(self) -> dict[str, Any]:
        """What the command's function takes besides the configuration."""
        return {"rollouts": SerialGroups(self.env, self.workers)}


def group_runner(
    policy: str, env: EnvConfig, decoder: str, cap: int
) -> Callable[[Sequence[Decision]], list[Group]]:
    """What runs the groups of some decisions, in a process of its own."""
    runner = PolicyRunner(joined(load(policy), env), decoder)
    pool = EnvPool(SHARD * (cap + 1), env)
    pool.env(0).needs("reinforce", *NEEDED)

    def run(decisions: Sequence[Decision]) -> list[Group]:
        groups: list[Group] = []
        branches: list[tuple[Group, list[int], Episode, Tensor]] = []
        for episode, path, states in _paths(runner, _driven(runner, pool, decisions), cap):
            executed = [
                tuple(state[: runner.executed_steps * tokens_per_step(runner)].tolist())
                for state in states
            ]
            groups.append(group := Group(episode.result.seed, path, [None] * len(states)))
            for first in (
                dict.fromkeys(map(executed.index, executed)) if len(set(executed)) > 1 else ()
            ):
                branch = _branched(episode, pool, len(decisions) + len(branches))
                alike = [i for i, tokens in enumerate(executed) if tokens == executed[first]]
                branches.append((group, alike, branch, states[first]))
        for _, _, branch, state in branches:
            execute(runner, branch, {}, runner.chunk(state))
        while active := [branch for _, _, branch, _ in branches if not branch.over]:
            replan(runner, active)
        for group, alike, branch, _ in branches:
            for index in alike:
                group.solved[index] = branch.result.success
        return groups

    return run


def _driven(runner: PolicyRunner, pool: EnvPool, decisions: Sequence[Decision]) -> list[Episode]:
    """The episodes that reach their decision, there."""
    limit = pool.max_episode_steps
    episodes = [
        Episode.start(pool.env(i), seed, task, limit) for i, (seed, task, _) in enumerate(decisions)
    ]
    left = {
        id(episode): chunks for episode, (_, _, chunks) in zip(episodes, decisions, strict=True)
    }
    while active := [episode for episode in episodes if left[id(episode)] and not episode.over]:
        replan(runner, active)
        left |= {id(episode): left[id(episode)] - 1 for episode in active}
    return [episode for episode in episodes if not episode.over]


def _paths(
    runner: PolicyRunner, episodes: Sequence[Episode], cap: int
) -> Iterator[tuple[Episode, NDArray[np.float64], list[Tensor]]]:
    """What a head sees (K, F) of each episode's next chunk, and its states (n,), after every
    forward.
    """
    if not episodes:
        return
    observations = [episode.env.observe() for episode in episodes]
    batch = observation_batch(observations, [episode.result.instruction for episode in episodes])
    Watched.kept.clear()
    result = runner.policy.decode(
        runner.preprocessor(batch),
        f"watched_cap{cap}",
        previous=stack_previous([episode.previous for episode in episodes]),
        shift_steps=runner.executed_steps,
        executed_steps=runner.executed_steps,
        record_states=True,
        read=False,
    )
    for row, (episode, count) in enumerate(zip(episodes, result.iterations.tolist(), strict=True)):
        seen = np.stack([found[row] for found in Watched.kept[:count]])
        yield episode, seen, [state[row].cpu() for state in result.states[1 : count + 1]]


def _branched(episode: Episode, pool: EnvPool, slot: int) -> Episode:
    """The episode once more, in the environment of a slot."""
    env = pool.env(slot)
    env.follow(episode.env)
    result = replace(
        episode.result, forwards=[], exit_reasons=[], block_layers=[], prefix_layers=[], seconds=[]
    )
    return replace(episode, env=env, result=result, actions=[*episode.actions])
