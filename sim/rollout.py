"""Closed-loop episodes of many environments in lock step, with one batched decode for all of them.

Evaluation, validation during training and the takeover recordings all drive the policy through this file.

**Determinism.** Environments take all randomness from `reset(seed)`, and a row of a batch does not look at
the other rows, so an episode depends on its seed and not on its neighbours, as far as floating point allows:
kernels for other batch sizes may round differently, and a token whose two best bins tie may then flip. Random
guesses are the one exception: a batch shares one generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import sim  # noqa: F401  (registers the environment)
from ceed_vla.errors import ConfigError

Bundle = tuple[Any, Any, Any]  # policy, pre-processor, post-processor, as `ceed_vla.load` returns them

ENV_ID = "ceed_vla/Tabletop-v0"
MAX_EPISODE_STEPS = 120


@dataclass
class Chunk:
    """One decoded chunk of one environment.

    Attributes:
        tokens: (n,) int64.
        actions: (m, A) float32, in the environment's units; None if the tokens stand for no chunk.
        forwards: Forwards after the prefill that this row took.
        exit_reason: The rule that ended its decoding; "malformed" if the tokens stand for no chunk.
        seconds: Wall time of the whole batch, by stage, and its size ("rows"). A latency only if rows is 1.
    """

    tokens: Tensor
    actions: np.ndarray | None
    forwards: int
    exit_reason: str
    seconds: dict[str, float]

    @property
    def warm_start(self) -> Tensor | None:
        """What the next chunk starts from."""
        return None if self.actions is None else self.tokens

    def first_actions(self, env: Any, count: int) -> np.ndarray:
        """The first `count` actions (count, A) at most; a chunk that cannot be read holds the arm of `env` still."""
        return np.tile(env.hold_action(), (count, 1)) if self.actions is None else self.actions[:count]


@dataclass
class EpisodeResult:
    """Outcome of one episode.

    Attributes:
        seed: Seed of the episode.
        task: Task family.
        instruction: What the policy was told.
        success: Solved within the step limit.
        steps: Control steps done.
        forwards: Per chunk, the forwards after the prefill that its row took.
        exit_reasons: Per chunk, the rule that ended its decoding.
        seconds: Per chunk, `Chunk.seconds`.
    """

    seed: int
    task: str = ""
    instruction: str = ""
    success: bool = False
    steps: int = 0
    forwards: list[int] = field(default_factory=list)
    exit_reasons: list[str] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    @property
    def iterations(self) -> list[int]:
        """Jacobi iterations per chunk; the same as `forwards` (an iteration is a forward)."""
        return self.forwards

    @property
    def chunks(self) -> int:
        """Number of decoded chunks."""
        return len(self.forwards)


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
        self,
        observations: Sequence[dict[str, Any]],
        instructions: Sequence[str],
        previous: Sequence[Tensor | None],
    ) -> list[Chunk]:
        """Decode one chunk per observation.

        Args:
            observations: B observations as the environment gives them.
            instructions: B instructions.
            previous: Per row the tokens (n,) of the chunk before, None at an episode's start.
        """
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
        return [
            Chunk(tokens[row], chunk, int(forwards[row]), "malformed" if chunk is None else reason, seconds)
            for row, (chunk, reason) in enumerate(zip(actions, result.exit_reason, strict=True))
        ]

    def _actions(self, tokens: Tensor) -> list[np.ndarray | None]:
        """The chunks (m, A) of `tokens` (B, n) in the environment's units, None where they stand for none."""
        readable = self.policy.tokenizer.readable(tokens)  # (B,)
        actions = self.policy.tokenizer.decode(tokens[readable])
        actions = actions if self.postprocessor is None else self.postprocessor(actions)
        chunks = iter(actions.to("cpu", torch.float32).numpy())
        return [next(chunks) if sound else None for sound in readable.tolist()]


def observation_batch(observations: Sequence[dict[str, Any]], instructions: Sequence[str]) -> dict[str, Any]:
    """B raw observations as a LeRobot batch: images (B, 3, S, S) in [0, 1], state (B, D), list of tasks."""
    batch: dict[str, Any] = {"task": list(instructions)}
    for camera in observations[0]["pixels"]:
        images = np.stack([observation["pixels"][camera] for observation in observations])  # (B, S, S, 3)
        batch[f"observation.images.{camera}"] = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    state = np.stack([np.asarray(observation["agent_pos"], dtype=np.float32) for observation in observations])
    batch["observation.state"] = torch.from_numpy(state)
    return batch


def stack_previous(previous: Sequence[Tensor | None]) -> Tensor | None:
    """Warm starts as (B, n), rows of -1 where there is none; None if no row has one."""
    known = next((tokens for tokens in previous if tokens is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, -1) if tokens is None else tokens for tokens in previous])


class EnvPool:
    """A fixed number of tabletop environments with cameras, made when first needed and used again.

    Args:
        size: Number of environments.
        split: Colours and phrasings: "train", "heldout" or "all".
        image_size: Side of both camera images [px].
        max_episode_steps: Step limit. The pool's users count steps themselves (`advance` bypasses gymnasium).
    """

    def __init__(
        self,
        size: int,
        split: str = "train",
        image_size: int = 96,
        max_episode_steps: int = MAX_EPISODE_STEPS,
    ) -> None:
        if size < 1:
            raise ConfigError(f"a pool needs at least 1 environment, not {size}")
        self.size, self.max_episode_steps = size, max_episode_steps
        self._kwargs: dict[str, Any] = {"task": "mixed", "split": split, "image_size": image_size}
        self._envs: list[gymnasium.Env[Any, Any]] = []

    def env(self, slot: int) -> Any:
        """The unwrapped environment of a slot (0 <= slot < size)."""
        while len(self._envs) <= slot:
            self._envs.append(gymnasium.make(ENV_ID, disable_env_checker=True, **self._kwargs))
        return self._envs[slot].unwrapped

    def close(self) -> None:
        """Release all environments."""
        for env in self._envs:
            env.close()
        self._envs.clear()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _Slot:
    """One environment at work on one episode."""

    index: int
    env: Any
    result: EpisodeResult
    order: int
    previous: Tensor | None = None


ChunkHook = Callable[[int, dict[str, Any], Chunk], None]


def rollout(
    policy_bundle: Bundle,
    seeds: Iterable[int],
    task: str | Sequence[str] = "mixed",
    *,
    decoding: Any = "ceed",
    executed_steps: int | None = None,
    batch: int = 20,
    split: str = "train",
    image_size: int = 96,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    pool: EnvPool | None = None,
    generator: torch.Generator | None = None,
    on_chunk: ChunkHook | None = None,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> list[EpisodeResult]:
    """Run one episode per seed; when one ends, the next seed takes over its environment.

    Args:
        policy_bundle: Policy, pre-processor, post-processor, as `ceed_vla.load` returns them.
        seeds: Episodes to run.
        task: A family or "mixed" for all seeds, or one family per seed.
        decoding: "ar", "jacobi", "ceed" or a `DecodingConfig`.
        executed_steps: Actions executed of each chunk before the next is decoded; None = the policy's own
            `n_action_steps`.
        batch: Environments that run side by side.
        split: Colours and phrasings: "train", "heldout" or "all".
        image_size: Side of both camera images [px].
        max_episode_steps: Control steps after which an episode counts as failed.
        pool: Environments to use again between calls; overrides `batch`, `split`, `image_size` and
            `max_episode_steps`.
        generator: Random source of random guesses.
        on_chunk: Called per decoded chunk with environment index, raw observation and `Chunk`.
        on_episode: Called per finished episode, e.g. to advance a progress bar.

    Returns:
        One `EpisodeResult` per seed, in the order of `seeds`.

    Raises:
        ConfigError: Impossible `seeds`, `batch`, `executed_steps` or `task`.
        SimulationError: The policy's actions are not finite.
    """
    seeds = list(seeds)
    tasks = [task] * len(seeds) if isinstance(task, str) else list(task)
    if len(tasks) != len(seeds):
        raise ConfigError(f"{len(tasks)} tasks for {len(seeds)} seeds; give one family, or one per seed")
    for seed, family in zip(seeds, tasks, strict=True):
        if (
            not isinstance(seed, int | np.integer)
            or isinstance(seed, bool)
            or seed < 0
            or not isinstance(family, str)
        ):
            raise ConfigError(
                f"seed {seed!r} with task {family!r}; a seed is a whole number of at least 0, a task a text"
            )
    if executed_steps is not None and executed_steps < 1:
        raise ConfigError(f"executed_steps={executed_steps} must be at least 1")
    runner = PolicyRunner(policy_bundle, decoding, generator, executed_steps)
    executed_steps = runner.executed_steps
    own = pool is None
    pool = pool or EnvPool(min(batch, max(len(seeds), 1)), split, image_size, max_episode_steps)
    results: list[EpisodeResult | None] = [None] * len(seeds)
    waiting = iter(zip(range(len(seeds)), seeds, tasks, strict=True))
    try:
        active = _started(_start(pool.env, index, waiting) for index in range(pool.size))
        while active:
            _step_chunk(runner, active, executed_steps, pool.max_episode_steps, on_chunk)
            following: list[_Slot | None] = []
            for slot in active:
                if not (slot.result.success or slot.result.steps >= pool.max_episode_steps):
                    following.append(slot)
                    continue
                results[slot.order] = slot.result
                if on_episode is not None:
                    on_episode(slot.result)
                following.append(_start(pool.env, slot.index, waiting))
            active = _started(following)
    finally:
        if own:
            pool.close()
    return [result for result in results if result is not None]


def _start(env_of: Callable[[int], Any], index: int, waiting: Iterator[tuple[int, int, str]]) -> _Slot | None:
    """Begin the next waiting episode in environment `index`; None if there is none."""
    following = next(waiting, None)
    if following is None:
        return None
    order, seed, task = following
    env = env_of(index)
    env.reset(seed=seed, options={} if task == "mixed" else {"task": task})
    return _Slot(index, env, EpisodeResult(seed, env.family, env.instruction), order)


def _started(slots: Iterable[_Slot | None]) -> list[_Slot]:
    return [slot for slot in slots if slot is not None]


def _step_chunk(
    runner: PolicyRunner, active: Sequence[_Slot], executed_steps: int, limit: int, on_chunk: ChunkHook | None
) -> None:
    """Observe, decode once for all, execute the first steps of every chunk."""
    observations = [slot.env.observe() for slot in active]
    chunks = runner.decode(
        observations, [slot.result.instruction for slot in active], [slot.previous for slot in active]
    )
    for slot, observation, chunk in zip(active, observations, chunks, strict=True):
        result = slot.result
        slot.previous = chunk.warm_start
        result.forwards.append(chunk.forwards)
        result.exit_reasons.append(chunk.exit_reason)
        result.seconds.append(chunk.seconds)
        if on_chunk is not None:
            on_chunk(slot.index, observation, chunk)
        allowed = min(executed_steps, limit - result.steps)
        steps, result.success = execute(slot.env, chunk.first_actions(slot.env, allowed))
        result.steps += steps


def execute(env: Any, actions: np.ndarray) -> tuple[int, bool]:
    """Execute actions (k, A) without rendering, until solved.

    Returns:
        (steps done, whether the task is solved).
    """
    for step, action in enumerate(actions, start=1):
        if advance(env, action):
            return step, True
    return len(actions), False


def advance(env: Any, action: np.ndarray) -> bool:
    """One control step of an unwrapped environment, without rendering. Returns whether the task is solved."""
    env.advance(action)
    return bool(env.is_success())


def success_rate(results: Sequence[EpisodeResult]) -> float:
    """Share of successful episodes; NaN without any."""
    return sum(result.success for result in results) / len(results) if results else math.nan


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate.

    Args:
        successes: Number k of successes.
        trials: Number n of trials; (0, 1) is returned for none.
        z: Normal quantile; the default gives 95 %.
    """
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
