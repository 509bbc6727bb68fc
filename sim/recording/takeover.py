"""Corrections of the expert from states that the policy itself reached (one DAgger round)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from sim.recording.attempts import Attempt, Frame, attempt_rng, expert_steps
from sim.recording.config import RecordConfig
from sim.rollout import EnvPool, PolicyRunner, execute

HANDBACK_STEPS = (8, 16)  # expert steps before the policy drives again, when an attempt has several takeovers


@dataclass
class _Drive:
    """One attempt in progress."""

    attempt: Attempt
    env: Any
    rng: np.random.Generator
    chunks_left: int = 0
    previous: Tensor | None = None
    segments: list[list[Frame]] = field(default_factory=list)
    done: bool = False


def takeover_attempts(
    runner: PolicyRunner, pool: EnvPool, seeds: range, config: RecordConfig
) -> list[Attempt]:
    """Let the policy drive all seeds in lock step, each for its own number of chunks, then the expert.

    Frames are stored from the takeover on, and only if the expert finishes within `config.takeover_steps`.

    Args:
        runner: The policy with its decoder.
        pool: At least `len(seeds)` environments.
        seeds: One attempt each.
        config: `max_chunks`, `executed_steps`, `takeover_steps`, `switches` and `max_steps` matter here.
    """
    drives = [_begin(pool.env(slot), seed, config) for slot, seed in enumerate(seeds)]
    for turn in range(config.switches):
        for drive in drives:
            drive.chunks_left = int(drive.rng.integers(1, max(1, config.max_chunks // config.switches) + 1))
            drive.previous = None
        _drive_all(runner, drives, config)
        for drive in drives:
            if not drive.done:
                _take_over(drive, config, last=turn == config.switches - 1)
    return [drive.attempt for drive in drives]


def _begin(env: Any, seed: int, config: RecordConfig) -> _Drive:
    attempt = Attempt(seed, config.family(seed), outcome="unfinished")
    env.reset(seed=seed, options={"task": attempt.task})
    return _Drive(attempt, env, attempt_rng(seed, config.mode))


def _drive_all(runner: PolicyRunner, drives: list[_Drive], config: RecordConfig) -> None:
    """The policy's turn: every attempt that is not done gets its `chunks_left` chunks."""
    while active := [drive for drive in drives if drive.chunks_left and not drive.done]:
        chunks = runner.decode(
            [drive.env.observe() for drive in active],
            [drive.env.instruction for drive in active],
            [drive.previous for drive in active],
        )
        for drive, chunk in zip(active, chunks, strict=True):
            drive.previous = chunk.warm_start
            drive.chunks_left -= 1
            steps, solved = execute(drive.env, chunk.first_actions(drive.env, config.executed_steps))
            drive.attempt.steps += steps
            if solved:
                drive.attempt.outcome, drive.done = "solved", True


def _take_over(drive: _Drive, config: RecordConfig, *, last: bool) -> None:
    """The expert's turn, recorded."""
    limit = (
        config.takeover_steps if last else int(drive.rng.integers(HANDBACK_STEPS[0], HANDBACK_STEPS[1] + 1))
    )
    frames: list[Frame] = []
    for frame, solved in expert_steps(drive.env, drive.rng):
        frames.append(frame)
        if solved or len(frames) >= limit:
            break
    drive.attempt.steps += len(frames)
    drive.segments.append(frames)
    if solved:
        drive.attempt.outcome, drive.attempt.segments, drive.done = "recorded", drive.segments, True
