"""The simulator's part of `ceed-vla improve`: serial groups from given states of episodes.

Every state of a decode path is executed from the same state of the simulator, and the same decoder
then drives the episode to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from torch import Tensor

from ceed_vla.checkpoints import load
from ceed_vla.errors import ConfigError
from ceed_vla.sim.branches import NEEDED, BranchingSimulation, branched
from ceed_vla.sim.env_tasks import task_of
from ceed_vla.sim.environment import TAKEOVER_SEEDS, EnvPool, flags, joined, observation_batch
from ceed_vla.sim.rollout import (
    SHARD,
    Episode,
    PolicyRunner,
    execute,
    replan,
    stack_previous,
    tokens_per_step,
)
from ceed_vla.starts import SerialGroup, Start
from ceed_vla.workers import ClusterConfig, open_workers


@dataclass
class Groups:
    """Rollouts for `ceed_vla.training.improve`.

    Attributes:
        env: Environment; must have ``snapshot`` and the methods listed with it.
        workers: Processes that share the episodes.
        cluster: Ray cluster that runs the episodes instead.
    """

    env: EnvConfig
    workers: int = 2
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def settings(self) -> list[str]:
        """Flags of the environment."""
        return flags(self.env)

    def first(self, seed: int, used: int, count: int) -> list[Start]:
        """The starts of `count` new episodes; tasks take turns.

        Args:
            seed: First seed. Behind the last training seed it goes on with this one again.
            used: Number of episodes before these.
            count: Number of episodes.

        Raises:
            ConfigError: The seed is not for training.
        """
        low, high = TAKEOVER_SEEDS
        if not low <= seed < high:
            raise ConfigError(
                f"--seed is {seed}; training seeds are {low} to {high - 1}. Change --seed."
            )
        seeds = [seed + (used + i) % (high - seed) for i in range(count)]
        return [Start(each, task_of(self.env, each)) for each in seeds]

    def __call__(
        self, policy: str, decoding: str, cap: int, starts: Sequence[Start], draw: int
    ) -> Iterator[SerialGroup]:
        """Yield the group of every start.

        Args:
            policy: Checkpoint of the policy.
            decoding: Decoder that drives the episodes.
            cap: Most forwards, and states of a group.
            starts: Where to decode.
            draw: Seed of the choice of the states in `SerialGroup.reached`.

        Raises:
            SimulationError: The environment lacks a method that is needed.
        """
        with EnvPool(1, self.env) as pool:  # before the workers start
            pool.env(0).needs("improve", *NEEDED)
        arguments = (policy, self.env, decoding, cap, draw)
        with open_workers(
            self.workers, self.cluster, group_runner, *arguments, checkpoints=[policy]
        ) as workers:
            for found in workers.map(batched(starts, SHARD)):
                yield from found


class ImproveSimulation(BranchingSimulation):
    """Simulator flags of `improve`."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the command's function besides the configuration."""
        return {"rollouts": Groups(self.env, self.workers, self.cluster)}


@dataclass
class Branch:
    """An episode that executes some states of a group."""

    group: SerialGroup
    alike: list[int]  # these states
    episode: Episode
    # number of actions and tokens of the chunk before, at every observation
    passed: list[tuple[int, Tensor | None]] = field(default_factory=list)

    def start(self, random: np.random.Generator) -> list[Start]:
        """One of the states that it passed, if any."""
        if not self.passed:
            return []
        steps, previous = self.passed[int(random.integers(len(self.passed)))]
        actions = tuple(tuple(map(float, action)) for action in self.episode.actions[:steps])
        tokens = () if previous is None else tuple(previous.tolist())
        return [Start(self.group.start.seed, self.group.start.task, actions, tokens)]


def group_runner(
    policy: str, env: EnvConfig, decoding: str, cap: int, draw: int
) -> Callable[[Sequence[Start]], list[SerialGroup]]:
    """Make the function of a worker process: starts -> their groups."""
    runner = PolicyRunner(joined(load(policy), env), decoding)
    pool = EnvPool(SHARD * (cap + 1), env)

    def run(starts: Sequence[Start]) -> list[SerialGroup]:
        episodes = [_resumed(pool, slot, start) for slot, start in enumerate(starts)]
        groups = _groups(runner, episodes, starts, cap)
        branches: list[Branch] = []
        for group, episode in zip(groups, episodes, strict=True):
            executed = [tuple(state) for state in group.states[1:, : group.executed].tolist()]
            if len(set(executed)) == 1:
                continue
            group.solved = [False] * len(executed)
            for tokens in dict.fromkeys(executed):
                alike = [i for i, other in enumerate(executed) if other == tokens]
                branch = Branch(group, alike, branched(episode, pool, len(starts) + len(branches)))
                execute(runner, branch.episode, {}, runner.chunk(group.states[1 + alike[0]]))
                branches.append(branch)
        while active := [branch for branch in branches if not branch.episode.over]:
            for branch in active:
                branch.passed.append((len(branch.episode.actions), branch.episode.previous))
            replan(runner, [branch.episode for branch in active])
        for branch in branches:
            group, result = branch.group, branch.episode.result
            for index in branch.alike:
                group.solved[index] = result.success
            group.steps += result.steps - len(
                group.start.actions
            )  # those before were repeated once
            place = (draw, group.start.seed, len(group.start.actions), branch.alike[0])
            group.reached += branch.start(np.random.default_rng(place))
        return groups

    return run


def _resumed(pool: EnvPool, slot: int, start: Start) -> Episode:
    """Repeat the actions of a partial history in the environment of a slot."""
    episode = Episode.start(pool.env(slot), start.seed, start.task)
    for values in start.actions:
        action = np.array(values, dtype=np.float32)
        episode.result.success = episode.env.advance(action)
        episode.result.steps += 1
        episode.actions.append(action)
    episode.previous = torch.tensor(start.previous) if start.previous else None
    return episode


@torch.inference_mode()
def _groups(
    runner: PolicyRunner, episodes: Sequence[Episode], starts: Sequence[Start], cap: int
) -> list[SerialGroup]:
    """Decode a chunk in every episode, as far as `cap` forwards, from the guess of the runner."""
    config = runner.policy.config
    own = config.named(runner.decoding)
    path = replace(config.named(f"cap{cap}"), guess=own.guess, tail=own.tail, seed=own.seed)
    observations = [episode.env.observe() for episode in episodes]
    batch = observation_batch(observations, [episode.result.instruction for episode in episodes])
    inputs = runner.preprocessor(batch)
    decoded = runner.policy.decode(
        inputs,
        path,
        previous=stack_previous([episode.previous for episode in episodes]),
        shift_steps=runner.executed_steps,
        executed_steps=runner.executed_steps,
        record_states=True,
        read=False,
    )
    states = torch.stack(decoded.states).cpu()
    size = runner.executed_steps * tokens_per_step(runner)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return [
        SerialGroup(
            start,
            {name: value[row : row + 1].cpu().clone() for name, value in tensors.items()},
            states[: 1 + count, row].clone(),
            size,
            [],
            len(start.actions),
        )
        for row, (start, count) in enumerate(zip(starts, decoded.iterations.tolist(), strict=True))
    ]
