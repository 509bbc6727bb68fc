"""Serial groups: the outcome of an episode from every state of one decode path.

After S-GRPO (arXiv 2505.07686). The states of a path are ordered, and each is the chunk that an
exit there would execute. They form one group: all continue from the same state of the simulator,
and the same decoder drives each to the end of the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from ceed_vla.sim.branches import NEEDED, BranchingSimulation, branched
from ceed_vla.sim.env_tasks import turns
from ceed_vla.sim.environment import TAKEOVER_SEEDS, EnvPool, joined, observation_batch
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
from ceed_vla.workers import ClusterConfig, Workers, open_workers

Decision = tuple[int, str, int]  # seed, task, number of chunks before the decision
Outcome = tuple[str, int, str, bool, int]  # decoder, seed, task, solved, number of chunks


@register_exit("watched", "watched", "")
class Watched(Learned):
    """An exit rule that never exits and records the features of every iteration."""

    reason = "watched"
    # (B, F) of every iteration of the last block
    recorded: ClassVar[list[NDArray[np.float64]]] = []

    def __init__(self) -> None:
        """Create the rule, which has no weights."""

    def ends(self, seen: Seen, measured: np.ndarray | None) -> NDArray[np.bool_]:
        assert measured is not None
        self.recorded.append(features(seen, measured))
        return np.zeros(len(measured), dtype=bool)


@dataclass
class SerialGroups:
    """Rollouts for `ceed_vla.training.axes.learned`.

    Attributes:
        env: Environment; must have ``snapshot`` and ``restore``.
        workers: Processes that share the episodes.
        cluster: Ray cluster that runs the episodes instead.
    """

    env: EnvConfig
    workers: int = 2
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def outcomes(self, policy: str, decoders: Sequence[str], seeds: range) -> Iterator[Outcome]:
        """Yield the outcome of each decoder on each seed, shard by shard."""
        low, high = TAKEOVER_SEEDS
        if not low <= seeds.start < seeds.stop <= high:
            raise ConfigError(
                f"--seed and --scouts select {seeds}; training seeds are {low} to {high - 1}. "
                "Change --seed or --scouts."
            )
        tasks = turns(self.env)
        with EnvPool(1, self.env) as pool:  # before the first episode
            pool.env(0).needs("reinforce", *NEEDED)
        episodes = [(seed, tasks[i % len(tasks)]) for i, seed in enumerate(seeds)]
        with self._opened(episode_runner, policy) as workers:
            runs = [(decoder, shard) for shard in batched(episodes, SHARD) for decoder in decoders]
            for (decoder, shard), found in zip(
                runs, workers.map((d, None, s) for d, s in runs), strict=True
            ):
                results = {result.seed: result for result in found}
                for seed, task in shard:
                    result = results[seed]
                    yield decoder, seed, task, result.success, len(result.forwards)

    def groups(
        self, policy: str, decoder: str, cap: int, decisions: Sequence[Decision]
    ) -> Iterator[Group]:
        """Yield the group of every decision that an episode driven by `decoder` reaches."""
        with self._opened(group_runner, policy, decoder, cap) as workers:
            for found in workers.map(batched(decisions, SHARD)):
                yield from found

    def _opened(self, make: Any, policy: str, *more: Any) -> Workers:
        """Workers of a policy in this environment."""
        return open_workers(
            self.workers, self.cluster, make, policy, self.env, *more, checkpoints=[policy]
        )


class ReinforceSimulation(BranchingSimulation):
    """Simulator flags of `reinforce`."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the command's function besides the configuration."""
        return {"rollouts": SerialGroups(self.env, self.workers, self.cluster)}


def group_runner(
    policy: str, env: EnvConfig, decoder: str, cap: int
) -> Callable[[Sequence[Decision]], list[Group]]:
    """Make the function of a worker process: decisions -> their groups."""
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
                branch = branched(episode, pool, len(decisions) + len(branches))
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
    """Run episodes up to their decisions; return those that reach them."""
    episodes = [
        Episode.start(pool.env(i), seed, task) for i, (seed, task, _) in enumerate(decisions)
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
    """Decode the next chunk of each episode.

    Yields:
        The episode, and after each of K forwards the features (K, F) and the states (n,).
    """
    if not episodes:
        return
    observations = [episode.env.observe() for episode in episodes]
    batch = observation_batch(observations, [episode.result.instruction for episode in episodes])
    Watched.recorded.clear()
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
        seen = np.stack([found[row] for found in Watched.recorded[:count]])
        yield episode, seen, [state[row].cpu() for state in result.states[1 : count + 1]]
