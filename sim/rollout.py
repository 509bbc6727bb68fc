"""The closed loop: many environments in lock step, with one batched decode for all of them.

Evaluation, validation during training, takeover recordings, clips and pictures all drive the policy
with `replan`.

**Determinism.** All randomness of an environment comes from `reset(seed)`, and the rows of a batch
are independent. So an episode depends on its seed only, up to floating point: kernels for another
batch size may round differently, which can flip a token whose two best bins tie. Random guesses are
the exception: a batch shares one generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from torch import Tensor

from ceed_vla.checkpoints import load
from ceed_vla.real_time import decode_behind
from ceed_vla.scheduling import torch_pinned
from ceed_vla.sim.env_tasks import MIXED
from ceed_vla.sim.environment import (
    Bundle,
    Environment,
    EnvPool,
    Observation,
    images_of,
    joined,
    observation_batch,
)
from ceed_vla.sim.success import success_entry as success_entry
from ceed_vla.sim.success import wilson_interval as wilson_interval

NO_LIMIT = 10**9  # steps
SHARD = 20  # episodes that a worker runs side by side


@dataclass
class Chunk:
    """One decoded chunk of one environment."""

    tokens: Tensor  # (n,) int64
    # (m, A) float32, in the environment's units; None if the tokens do not decode to a chunk
    actions: np.ndarray | None
    forwards: int  # forwards after the prefill that this row took
    # the rule that ended decoding; "malformed" if the tokens do not decode to a chunk
    exit_reason: str
    # Wall time of the whole batch, by stage, and its size ("rows"). A latency only if rows is 1.
    seconds: dict[str, float]
    block_layers: int = 0  # layers that ran in these forwards
    prefix_layers: int = 0  # layers that the prefix ran through

    @property
    def warm_start(self) -> Tensor | None:
        """Tokens (n,) from which the next chunk starts; None if they are malformed."""
        return None if self.actions is None else self.tokens


@dataclass
class EpisodeResult:
    """Outcome of one episode."""

    seed: int
    task: str = ""  # task family
    instruction: str = ""
    success: bool = False  # solved within the step limit
    steps: int = 0  # control steps done
    # One entry per chunk in each of these lists, see `Chunk`.
    forwards: list[int] = field(default_factory=list)
    exit_reasons: list[str] = field(default_factory=list)
    block_layers: list[int] = field(default_factory=list)
    prefix_layers: list[int] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    # Statistics of its motion, see `motion_of`; empty until the episode is over.
    motion: dict[str, float] = field(default_factory=dict)
    tokens: str = ""  # digest of the tokens of all chunks


def motion_of(actions: np.ndarray, increments: Sequence[int], fps: int) -> dict[str, float]:
    """Compute motion statistics of an episode, in the units of its actions.

    Args:
        actions: Executed actions (T, A).
        increments: Action dimensions that are increments; their sums are the path. If empty, the
            actions are the path.
        fps: Control rate [Hz].

    Returns:
        ``action_rate``, the mean change of the action per step; ``path``, the length of the
        commanded path; ``jerk``, the mean of the path's third derivative [1/s^3].
    """
    steps = actions[:, list(increments)] if increments else np.diff(actions, axis=0)  # (T, ...)

    def length(rows: np.ndarray) -> float:
        return float(np.linalg.norm(rows, axis=1).mean()) if len(rows) else 0.0

    return {
        "action_rate": length(np.diff(actions, axis=0)),
        "path": length(steps) * len(steps),
        "jerk": length(np.diff(steps, 2, axis=0)) * fps**3,
    }


class PolicyRunner:
    """Turns raw observations into chunks, batched.

    Args:
        bundle: Policy, preprocessor and postprocessor; the processors may be None (identity).
        decoding: A name, such as "cap2", or a `DecodingConfig`.
        generator: Source of random guesses; None: the configuration's seed.
        executed_steps: Steps of a chunk that are executed before the next replan; None: the
            policy's own ``n_action_steps``.
        delay: Control steps that pass while a chunk is decoded. The robot meanwhile continues the
            previous chunk, so the next steps of that chunk are frozen at the start of the new one
            (`ceed_vla.real_time`); where the previous chunk ends, the robot holds.
    """

    def __init__(
        self,
        bundle: Bundle,
        decoding: Any = "ceed",
        generator: torch.Generator | None = None,
        executed_steps: int | None = None,
        delay: int = 0,
    ) -> None:
        self.policy, self.preprocessor, self.postprocessor = bundle
        self.executed_steps = int(executed_steps or self.policy.config.n_action_steps)
        self.delay = delay
        self.decoding = decoding
        self.generator = generator

    @torch.inference_mode()
    def decode(
        self,
        observations: Sequence[dict[str, Any]],
        instructions: Sequence[str],
        previous: Sequence[Tensor | None],
        frozen_steps: Sequence[int] = (),
    ) -> list[Chunk]:
        """Decode a chunk for each of B observations.

        Args:
            observations: Raw observations of the environments.
            instructions: Instruction of each.
            previous: Warm start of each chunk (`Episode.previous`), or None.
            frozen_steps: Number of frozen steps at the start of each chunk; empty: none.
        """
        counts = sorted(set(frozen_steps))
        if len(counts) > 1:  # a batch has one number of frozen steps
            by_row: dict[int, Chunk] = {}
            for count in counts:
                rows = [row for row, steps in enumerate(frozen_steps) if steps == count]
                chunks = PolicyRunner.decode(
                    self,
                    [observations[row] for row in rows],
                    [instructions[row] for row in rows],
                    [previous[row] for row in rows],
                    [count] * len(rows),
                )
                by_row |= zip(rows, chunks, strict=True)
            return [by_row[row] for row in range(len(observations))]
        batch = observation_batch(observations, instructions)
        if self.preprocessor is not None:
            batch = self.preprocessor(batch)
        every = max(self.executed_steps, self.delay)  # steps from one observation to the next
        with torch_pinned():
            result = decode_behind(
                self.policy,
                batch,
                counts[0] if counts else 0,
                every,
                decoding=self.decoding,
                previous=stack_previous(previous),
                generator=self.generator,
                shift_steps=0 if self.continues else every,
                read=False,
            )
        actions = self._actions(result.tokens)
        tokens = result.tokens.cpu()
        forwards = result.iterations.tolist()
        found = []
        seconds = {**(result.seconds or {}), "rows": len(observations)}
        none = torch.zeros_like(result.iterations)
        block, prefix = (
            none if layers is None else layers
            for layers in (result.layer_forwards, result.prefix_layers)
        )
        for row, chunk in enumerate(actions):
            reason = "malformed" if chunk is None else result.exit_reason[row]
            found.append(
                Chunk(
                    tokens[row],
                    chunk,
                    forwards[row],
                    reason,
                    seconds,
                    int(block[row]),
                    int(prefix[row]),
                )
            )
        return found

    @property
    def continues(self) -> bool:
        """Whether a chunk begins with frozen steps of the previous chunk."""
        return self.delay > 0 and tokens_per_step(self) > 0

    @property
    def alone(self) -> bool:
        """Whether a chunk must not share a batch: a deadline applies to a single chunk."""
        return self.policy.config.named(self.decoding).deadline_s is not None

    @property
    def one_row(self) -> bool:
        """Whether episodes run one at a time.

        Besides for a deadline, this is for decoders whose rows wait for each other: their forwards
        would not be those of a robot.
        """
        config = self.policy.config.named(self.decoding)
        return self.alone or config.decoder.rows_wait or config.window is not None

    def chunk(self, tokens: Tensor) -> Chunk:
        """Return the chunk that `tokens` (n,) decode to, without statistics."""
        return Chunk(tokens, self._actions(tokens.unsqueeze(0))[0], 0, "given", {})

    def _actions(self, tokens: Tensor) -> list[np.ndarray | None]:
        """Decode `tokens` (B, n) to chunks (m, A) in the environment's units; None if malformed."""
        readable = self.policy.tokenizer.readable(tokens)  # (B,)
        decoded = self.policy.tokenizer.decode(tokens[readable])
        # A postprocessor may add each row's state, so it gets all rows.
        actions = decoded.new_zeros(len(tokens), *decoded.shape[1:])
        actions[readable] = decoded
        actions = actions if self.postprocessor is None else self.postprocessor(actions)
        chunks = actions.to("cpu", torch.float32).numpy()
        return [
            chunk if sound else None for chunk, sound in zip(chunks, readable.tolist(), strict=True)
        ]


def stack_previous(previous: Sequence[Tensor | None]) -> Tensor | None:
    """Stack warm starts to (B, n), with -1 in rows without one; None if no row has one."""
    known = next((tokens for tokens in previous if tokens is not None), None)
    if known is None:
        return None
    return torch.stack(
        [torch.full_like(known, -1) if tokens is None else tokens for tokens in previous]
    )


@dataclass
class Episode:
    """A running episode."""

    env: Environment
    result: EpisodeResult  # its outcome so far
    limit: int  # step limit
    # Tokens (n,) of the previous chunk; None at the start. If the next chunk continues it, they are
    # shifted to the robot's next step, and the last step is repeated.
    previous: Tensor | None = None
    rest: Sequence[Any] = ()  # actions (k, A) of the previous chunk that are not executed yet
    actions: list[np.ndarray] = field(default_factory=list)  # executed so far, (A,) each

    @classmethod
    def start(cls, env: Environment, seed: int, task: str, limit: int = 0) -> Episode:
        """Reset `env` to the episode of `seed`; a positive `limit` replaces its step limit."""
        env.reset(seed, task)  # decides which limit applies
        limit = limit or env.max_episode_steps
        return cls(env, EpisodeResult(seed, env.task, env.instruction), limit)

    @property
    def over(self) -> bool:
        """Whether the episode is solved, was ended, or is out of steps."""
        return self.env.success or self.env.finished or self.result.steps >= self.limit


@dataclass
class Replan:
    """One replan: observation, decoded chunk, and its execution until the next replan."""

    observation: Observation
    instruction: str
    previous: Tensor | None  # `Episode.previous`
    chunk: Chunk
    step: int  # control steps done before this chunk
    # Camera images after each executed step, if requested.
    views: list[dict[str, np.ndarray]] = field(default_factory=list)
    success: bool = False  # whether the episode was solved while this chunk ran
    finished: bool = False  # whether the episode ended


def replan(
    runner: PolicyRunner, episodes: Sequence[Episode], *, watch: bool = False
) -> list[Replan]:
    """Observe, decode once for all episodes, and execute until the next observation.

    With `watch`, the camera views of every step are stored.
    """
    observations = [episode.env.observe() for episode in episodes]
    frozen_steps = [
        0 if episode.previous is None else min(runner.delay, len(episode.rest))
        for episode in episodes
    ]
    chunks = runner.decode(
        observations,
        [episode.result.instruction for episode in episodes],
        [episode.previous for episode in episodes],
        frozen_steps if runner.continues else (),
    )
    return [
        execute(runner, episode, observation, chunk, watch=watch)
        for episode, observation, chunk in zip(episodes, observations, chunks, strict=True)
    ]


def execute(
    runner: PolicyRunner,
    episode: Episode,
    observation: Observation,
    chunk: Chunk,
    *,
    watch: bool = False,
) -> Replan:
    """Execute a chunk until the next observation; `watch` stores the camera views."""
    env, result = episode.env, episode.result
    moment = Replan(observation, result.instruction, episode.previous, chunk, result.steps)
    episode.previous = chunk.warm_start
    result.forwards.append(chunk.forwards)
    result.exit_reasons.append(chunk.exit_reason)
    result.block_layers.append(chunk.block_layers)
    result.prefix_layers.append(chunk.prefix_layers)
    result.seconds.append(chunk.seconds)
    result.tokens = _digest(result.tokens, chunk.tokens)
    # The arm holds if a chunk is malformed, or ends before the next one is ready.
    fresh: Any = [None] * runner.executed_steps if chunk.actions is None else chunk.actions
    before: list[Any] = [*episode.rest[: runner.delay]]
    before += [None] * (runner.delay - len(before))  # the chunk before has ended: the robot holds
    begin = min(runner.delay, len(episode.rest))
    end = begin + max(runner.executed_steps - runner.delay, 0)
    episode.rest = fresh[end:]
    if episode.previous is not None and runner.continues:
        size = tokens_per_step(runner)
        repeated = chunk.tokens[-size:].repeat(end)
        episode.previous = torch.cat([chunk.tokens[end * size :], repeated])
    for proposed in [*before, *fresh[begin:end]][: episode.limit - result.steps]:
        action = env.hold_action() if proposed is None else proposed
        result.success = env.advance(action)
        result.steps += 1
        episode.actions.append(action)
        if watch:
            moment.views.append(images_of(env.observe()))
        if episode.over:
            break
    moment.success, moment.finished = result.success, episode.over
    if episode.over:
        increments = getattr(runner.policy.config, "delta_dims", None) or ()
        result.motion = motion_of(np.array(episode.actions), increments, env.config.fps)
    return moment


def _digest(before: str, tokens: Tensor) -> str:
    """Digest of the tokens (n,) of a chunk, after chunks with the digest `before`."""
    digest = hashlib.sha256(before.encode() + tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:12]


def tokens_per_step(runner: PolicyRunner) -> int:
    """Tokens of a step; 0 if their number varies, so that no step can be frozen."""
    return getattr(runner.policy.tokenizer, "tokens_per_step", None) or 0


def drive(
    runner: PolicyRunner, pool: EnvPool, seed: int, task: str = MIXED, *, watch: bool = False
) -> Iterator[Replan]:
    """Run one episode in a pool's first environment as `rollout` does; yield every replan."""
    episode = Episode.start(pool.env(0), seed, task)
    while not episode.over:
        yield from replan(runner, [episode], watch=watch)


def rollout(
    runner: PolicyRunner, pool: EnvPool, episodes: Iterable[tuple[int, str]]
) -> Iterator[EpisodeResult]:
    """Run episodes side by side; when one ends, the next one takes its environment.

    With a deadline, or a decoder whose rows wait for each other, one episode runs at a time. A
    decoder that learns from chunk to chunk begins anew.

    Args:
        runner: Runs the policy; its bundle is `joined` for the environments of `pool`.
        pool: Environments.
        episodes: (seed, task) of every episode.

    Yields:
        The result of every episode as it ends.
    """
    waiting = iter(episodes)

    def begin(slot: int) -> Episode | None:
        """Start the next episode in the environment of a slot; None if all have started."""
        for seed, task in waiting:
            return Episode.start(pool.env(slot), seed, task)
        return None

    forget = runner.policy.config.named(runner.decoding).decoder.forget
    if forget is not None:
        forget(runner.policy.backbone)
    slots = [begin(slot) for slot in range(1 if runner.one_row else pool.side_by_side)]
    while active := {slot: episode for slot, episode in enumerate(slots) if episode is not None}:
        replan(runner, list(active.values()))
        for episode in active.values():
            if episode.over:
                yield episode.result
        slots = [
            begin(i) if episode is not None and episode.over else episode
            for i, episode in enumerate(slots)
        ]


def episode_runner(
    policy: str, env: EnvConfig, instruction: str = ""
) -> Callable[[tuple[Any, int | None, Any]], Iterator[EpisodeResult]]:
    """Make the function of a worker: (decoding, executed steps, shard) -> results.

    See `Workers`; a shard is a sequence of (seed, task).
    """
    return partial(run_shard, joined(load(policy), env), EnvPool(SHARD, env, instruction))


def run_shard(
    bundle: Bundle, pool: EnvPool, item: tuple[Any, int | None, Sequence[tuple[int, str]]]
) -> Iterator[EpisodeResult]:
    """Run an item of `episode_runner` with a policy that is `joined` for the environment."""
    decoding, executed_steps, episodes = item
    generator = torch.Generator().manual_seed(0)
    return rollout(PolicyRunner(bundle, decoding, generator, executed_steps), pool, episodes)
