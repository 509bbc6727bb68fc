"""Corrections of the expert from states that the policy itself reached (one DAgger round)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.environment import EnvPool
from sim.recording.attempts import Attempt, Frame, attempt_rng, expert_steps
from sim.recording.config import RecordConfig
from sim.rollout import NO_LIMIT, Episode, PolicyRunner, replan

HANDBACK_STEPS = (8, 16)  # expert steps before the policy drives again, when an attempt has several takeovers


@dataclass
class _Drive:
    attempt: Attempt
    episode: Episode
    rng: np.random.Generator
    chunks_left: int = 0
    segments: list[list[Frame]] = field(default_factory=list)


def takeover_attempts(runner: PolicyRunner, pool: EnvPool, seeds: range, config: RecordConfig) -> list[Attempt]:
    """Let the policy drive all seeds in lock step, each for its own number of chunks, then the expert.

    Frames are stored from the takeover on, and only if the expert finishes within `config.takeover_steps`.
    """
    drives = []
    for slot, seed in enumerate(seeds):
        episode = Episode.start(pool.env(slot), seed, config.task(seed), NO_LIMIT)
        attempt = Attempt(seed, episode.env.task, outcome="unfinished")
        drives.append(_Drive(attempt, episode, attempt_rng(seed, config.mode)))
    for turn in range(config.switches):
        for drive in drives:
            drive.chunks_left = int(drive.rng.integers(1, max(1, config.max_chunks // config.switches) + 1))
            drive.episode.previous = None
        while active := [drive for drive in drives if drive.chunks_left and not drive.episode.over]:
            replan(runner, [drive.episode for drive in active])
            for drive in active:
                drive.chunks_left -= 1
                if drive.episode.result.success:
                    drive.attempt.outcome = "solved"
        for drive in drives:
            if not drive.episode.over:
                _take_over(drive, config, last=turn == config.switches - 1)
    return [drive.attempt for drive in drives]


def _take_over(drive: _Drive, config: RecordConfig, *, last: bool) -> None:
    """The expert's turn, recorded."""
    limit = config.takeover_steps if last else int(drive.rng.integers(HANDBACK_STEPS[0], HANDBACK_STEPS[1] + 1))
    env, frames = drive.episode.env, []
    for frame, _ in expert_steps(env, drive.rng):
        frames.append(frame)
        if drive.episode.over or len(frames) >= limit:
            break
    drive.segments.append(frames)
    if env.success:
        drive.attempt.outcome, drive.attempt.segments = "recorded", drive.segments
