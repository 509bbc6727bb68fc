"""The closed loop: many environments in lock step, with one batched decode for all of them.

Evaluation, validation during training, takeover recordings, clips and pictures all drive the policy by `replan`.

**Determinism.** Environments take all randomness from `reset(seed)`, and a row of a batch does not look at
the other rows, so an episode depends on its seed and not on its neighbours, as far as floating point allows:
kernels for other batch sizes may round differently, and a token whose two best bins tie may then flip. Random
guesses are the one exception: a batch shares one generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from torch import Tensor

from ceed_vla.errors import ConfigError
from sim.environment import (
    MIXED,
    Bundle,
    Environment,
    EnvPool,
    Observation,
    images_of,
    joined,
    observation_batch,
    turns,
)
from sim.tabletop.lerobot_env import mixed_tabletop

NO_LIMIT = 10**9  # steps


@dataclass
class Chunk:
    """One decoded chunk of one environment.

    Attributes:
        tokens: (n,) int64.
        actions: (m, A) float32, in the environment's units; None if the tokens stand for no chunk.
        forwards: Forwards after the prefill that this row took.
        block_layers: Layers that ran in these.
        prefix_layers: Layers that the prefix ran through.
        exit_reason: The rule that ended its decoding; "malformed" if the tokens stand for no chunk.
        seconds: Wall time of the whole batch, by stage, and its size ("rows"). A latency only if rows is 1.
    """

    tokens: Tensor
    actions: np.ndarray | None
    forwards: int
    exit_reason: str
    seconds: dict[str, float]
    block_layers: int = 0
    prefix_layers: int = 0

    @property
    def warm_start(self) -> Tensor | None:
        """What the next chunk starts from."""
        return None if self.actions is None else self.tokens


@dataclass
class EpisodeResult:
    """Outcome of one episode.

    Attributes:
        task: Task family.
        success: Solved within the step limit.
        steps: Control steps done.
        forwards: Of every chunk, as the lists below: what `Chunk` says.
    """

    seed: int
    task: str = ""
    instruction: str = ""
    success: bool = False
    steps: int = 0
    forwards: list[int] = field(default_factory=list)
    exit_reasons: list[str] = field(default_factory=list)
    block_layers: list[int] = field(default_factory=list)
    prefix_layers: list[int] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)


class PolicyRunner:
    """Turns raw observations into chunks, batched.

    Args:
        bundle: Policy, pre-processor and post-processor; the processors may be None (identity).
        decoding: A name, such as "cap2", or a `DecodingConfig`.
        generator: Random source of random guesses; None = the configuration's seed.
        executed_steps: Steps of a chunk that are executed before the next; the policy's own ``n_action_steps`` if None.
    """

    def __init__(
        self,
        bundle: Bundle,
        decoding: Any = "ceed",
        generator: torch.Generator | None = None,
        executed_steps: int | None = None,
    ) -> None:
        self.policy, self.preprocessor, self.postprocessor = bundle
        self.executed_steps = int(executed_steps or self.policy.config.n_action_steps)
        self.decoding = decoding
        self.generator = generator

    @torch.inference_mode()
    def decode(
        self, observations: Sequence[dict[str, Any]], instructions: Sequence[str], previous: Sequence[Tensor | None]
    ) -> list[Chunk]:
        """A chunk for each of B observations and instructions; `previous`: tokens (n,) of the one before, if any."""
        batch = observation_batch(observations, instructions)
        if self.preprocessor is not None:
            batch = self.preprocessor(batch)
        result = self.policy.decode(
            batch,
            decoding=self.decoding,
            previous=stack_previous(previous),
            generator=self.generator,
            shift_steps=self.executed_steps,
            executed_steps=self.executed_steps,
            read=False,
        )
        actions = self._actions(result.tokens)
        tokens, forwards = result.tokens.cpu(), result.iterations.tolist()
        seconds = {**(result.seconds or {}), "rows": len(observations)}
        none = torch.zeros_like(result.iterations)
        block, prefix = (none if found is None else found for found in (result.layer_forwards, result.prefix_layers))
        return [
            Chunk(
                tokens[row],
                chunk,
                int(forwards[row]),
                "malformed" if chunk is None else reason,
                seconds,
                int(block[row]),
                int(prefix[row]),
            )
            for row, (chunk, reason) in enumerate(zip(actions, result.exit_reason, strict=True))
        ]

    def _actions(self, tokens: Tensor) -> list[np.ndarray | None]:
        """The chunks (m, A) of `tokens` (B, n) in the environment's units, None where they stand for none."""
        readable = self.policy.tokenizer.readable(tokens)  # (B,)
        actions = self.policy.tokenizer.decode(tokens[readable])
        actions = actions if self.postprocessor is None else self.postprocessor(actions)
        chunks = iter(actions.to("cpu", torch.float32).numpy())
        return [next(chunks) if sound else None for sound in readable.tolist()]


def stack_previous(previous: Sequence[Tensor | None]) -> Tensor | None:
    """Warm starts as (B, n), rows of -1 where there is none; None if no row has one."""
    known = next((tokens for tokens in previous if tokens is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, -1) if tokens is None else tokens for tokens in previous])


@dataclass
class Episode:
    """One episode under way.

    Attributes:
        result: What has come of it so far.
        limit: Most control steps.
        previous: Tokens (n,) of the chunk before; None at the start.
    """

    env: Environment
    result: EpisodeResult
    limit: int
    previous: Tensor | None = None

    @classmethod
    def start(cls, env: Environment, seed: int, task: str, limit: int) -> Episode:
        """Reset `env` to the episode of `seed`."""
        env.reset(seed, task)
        return cls(env, EpisodeResult(seed, env.task, env.instruction), limit)

    @property
    def over(self) -> bool:
        """Whether it is solved, or out of steps."""
        return self.env.success or self.env.finished or self.result.steps >= self.limit


@dataclass
class Replan:
    """A moment at which a new chunk was decoded, and what followed until the next one.

    Attributes:
        previous: Tokens (n,) of the chunk before; None at the start.
        step: Control steps done before this chunk.
        views: Camera images after each executed step, if they were asked for.
        success: Whether the episode was solved while this chunk ran.
        finished: Whether the episode ended.
    """

    observation: Observation
    instruction: str
    previous: Tensor | None
    chunk: Chunk
    step: int
    views: list[dict[str, np.ndarray]] = field(default_factory=list)
    success: bool = False
    finished: bool = False


def replan(
    runner: PolicyRunner, episodes: Sequence[Episode], executed_steps: int, *, watch: bool = False
) -> list[Replan]:
    """Observe, decode once for all episodes, execute the first steps of every chunk; `watch` keeps the views."""
    observations = [episode.env.observe() for episode in episodes]
    chunks = runner.decode(
        observations, [episode.result.instruction for episode in episodes], [e.previous for e in episodes]
    )
    moments = []
    for episode, observation, chunk in zip(episodes, observations, chunks, strict=True):
        env, result = episode.env, episode.result
        moment = Replan(observation, result.instruction, episode.previous, chunk, result.steps)
        episode.previous = chunk.warm_start
        result.forwards.append(chunk.forwards)
        result.exit_reasons.append(chunk.exit_reason)
        result.block_layers.append(chunk.block_layers)
        result.prefix_layers.append(chunk.prefix_layers)
        result.seconds.append(chunk.seconds)
        count = min(executed_steps, episode.limit - result.steps)
        # A chunk that cannot be read holds the arm still.
        for action in [env.hold_action()] * count if chunk.actions is None else chunk.actions[:count]:
            result.success = env.advance(action)
            result.steps += 1
            if watch:
                moment.views.append(images_of(env.observe()))
            if episode.over:
                break
        moment.success, moment.finished = result.success, episode.over
        moments.append(moment)
    return moments


def drive(
    runner: PolicyRunner, pool: EnvPool, seed: int, executed_steps: int, task: str = MIXED, *, watch: bool = False
) -> Iterator[Replan]:
    """Run one episode in the first environment of a pool, the same as `rollout` does, and yield every replan."""
    episode = Episode.start(pool.env(0), seed, task, pool.max_episode_steps)
    while not episode.over:
        yield from replan(runner, [episode], executed_steps, watch=watch)


def rollout(
    policy_bundle: Bundle,
    seeds: Iterable[int],
    env: EnvConfig | None = None,
    *,
    tasks: Sequence[str] | None = None,
    decoding: Any = "ceed",
    executed_steps: int | None = None,
    batch: int = 20,
    pool: EnvPool | None = None,
    generator: torch.Generator | None = None,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> list[EpisodeResult]:
    """Run one episode per seed; when one ends, the next seed takes over its environment.

    Results are in the order of `seeds`.

    Args:
        policy_bundle: Policy, pre-processor, post-processor, as `ceed_vla.load` returns them.
        seeds: Episodes to run.
        env: The environment; None = the tabletop with mixed tasks.
        tasks: One per seed; None = those of the environment take turns.
        decoding: "ar", "jacobi", "ceed" or a `DecodingConfig`.
        executed_steps: Actions executed of each chunk before the next is decoded; None = the policy's own
            `n_action_steps`.
        batch: Environments that run side by side.
        pool: Environments to use again, for which the bundle was `joined`; overrides `env` and `batch`.
        generator: Random source of random guesses.
        on_episode: Called per finished episode.

    Raises:
        ConfigError: Impossible `seeds`, `batch`, `executed_steps` or `tasks`.
        SimulationError: An environment that cannot be made.
    """
    seeds = list(seeds)
    env = pool.config if pool is not None else env or mixed_tabletop()
    tasks = [turns(env)[i % len(turns(env))] for i in range(len(seeds))] if tasks is None else list(tasks)
    if len(tasks) != len(seeds):
        raise ConfigError(f"{len(tasks)} tasks for {len(seeds)} seeds; give one per seed")
    bad = [s for s in seeds if not isinstance(s, int | np.integer) or isinstance(s, bool) or s < 0]
    if bad:
        raise ConfigError(f"seed {bad[0]!r}; a seed is a whole number of at least 0")
    if executed_steps is not None and executed_steps < 1:
        raise ConfigError(f"executed_steps={executed_steps} must be at least 1")
    bundle = joined(policy_bundle, env) if pool is None else policy_bundle
    runner = PolicyRunner(bundle, decoding, generator, executed_steps)
    results: list[EpisodeResult] = []
    waiting = zip(seeds, tasks, strict=True)
    with EnvPool(min(batch, max(len(seeds), 1)), env) if pool is None else nullcontext(pool) as envs:

        def begin(slot: int) -> Episode | None:
            """The next waiting episode, in the environment of a slot; None if all have begun."""
            for seed, task in waiting:
                episode = Episode.start(envs.env(slot), seed, task, envs.max_episode_steps)
                results.append(episode.result)
                return episode
            return None

        slots = [begin(slot) for slot in range(envs.size)]
        while active := {slot: episode for slot, episode in enumerate(slots) if episode is not None}:
            replan(runner, list(active.values()), runner.executed_steps)
            for episode in active.values():
                if episode.over and on_episode is not None:
                    on_episode(episode.result)
            slots = [begin(i) if episode is not None and episode.over else episode for i, episode in enumerate(slots)]
    return results


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate, at 95 % for the default normal quantile `z`; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
