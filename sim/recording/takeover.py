"""Corrections of the expert from states that the policy itself reached (one DAgger round)."""

from __future__ import annotations

from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.recording.attempts import Attempt, Frame, attempt_rng, expert_steps
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.rollout import NO_LIMIT, Episode, PolicyRunner, replan


def takeover_attempts(
    runner: PolicyRunner, pool: EnvPool, seeds: range, config: RecordConfig
) -> list[Attempt]:
    """Run the policy on all seeds in lock step, then the expert on each.

    The policy drives each seed for its own random number of chunks. Frames are stored from the
    takeover on, and only if the expert finishes within `config.takeover_steps`.
    """
    episodes = [
        Episode.start(pool.env(i), seed, config.task(seed), NO_LIMIT)
        for i, seed in enumerate(seeds)
    ]
    chunks = [
        int(attempt_rng(seed, config.mode).integers(1, config.max_chunks + 1)) for seed in seeds
    ]
    for turn in range(max(chunks)):
        driven = [e for e, own in zip(episodes, chunks, strict=True) if turn < own and not e.over]
        if driven:
            replan(runner, driven)
    return [_attempt(episode, seed, config) for episode, seed in zip(episodes, seeds, strict=True)]


def _attempt(episode: Episode, seed: int, config: RecordConfig) -> Attempt:
    """Record the expert from the state that the policy reached."""
    env = episode.env
    frames = list[Frame]()
    attempt = Attempt(seed, env.task, outcome="solved" if episode.result.success else "unfinished")
    if episode.over:
        return attempt
    for frame, _ in expert_steps(env):
        frames.append(frame)
        if episode.over or len(frames) >= config.takeover_steps:
            break
    if env.success:
        attempt.outcome, attempt.segments = "recorded", [frames]
    return attempt
