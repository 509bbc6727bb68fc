"""`ceed-vla record`: record demonstrations of scripted experts as a LeRobotDataset v3.

See `ceed_vla.sim.recording.config.RecordConfig` for all options.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.checkpoints import load, resolve_checkpoint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.commits import PROGRESS_FILE, is_recording, read_progress
from ceed_vla.data.files import is_whole
from ceed_vla.data.writer import DatasetWriter
from ceed_vla.errors import ConfigError, DatasetError
from ceed_vla.outputs import owned_folder
from ceed_vla.sim.environment import Environment, EnvPool, check_features, joined
from ceed_vla.sim.recording.attempts import (
    Attempt,
    expert_attempt,
    frame_features,
    grounding_scenes,
)
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.recording.interrupts import handled_by, held_back
from ceed_vla.sim.recording.roots import removed_while_empty
from ceed_vla.sim.recording.takeover import takeover_attempts
from ceed_vla.sim.rollout import PolicyRunner
from ceed_vla.wording import counted
from ceed_vla.workers import open_workers

logger = logging.getLogger(__name__)

POLICY = "policy"  # progress key: fingerprint of the policy that drives takeovers


@dataclass
class RecordSummary:
    """Contents of the dataset."""

    root: Path
    episodes: int  # stored LeRobot episodes
    frames: int
    attempts: int  # attempts made, including earlier runs of a resumed dataset
    outcomes: dict[str, int]  # attempts by "family/outcome"
    # largest number of scenes per stored episode in mode grounding; 0 in the other modes
    scenes: int = 0

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        source = counted(self.attempts, "scene" if self.scenes else "attempt")
        text = (
            f"{counted(self.frames, 'frame')} in {counted(self.episodes, 'episode')}, from {source}"
        )
        if self.scenes:
            text += (
                f" (a grounding episode stores up to {counted(self.scenes, 'scene')}, without "
                "actions)"
            )
        return f"{self.root}: {text}: {outcomes}"


def record(config: RecordConfig) -> RecordSummary:
    """Record a dataset, or continue an interrupted one after its last complete unit.

    Stored episodes stay readable after any failure. If none is stored, a new `root` is removed.

    Raises:
        ConfigError: `root` exists (without `resume`) or was recorded with other options, or the
            policy of a takeover does not fit the environment.
        DatasetError: `root` is not a recording, or the disk is full.
        SimulationError: The environment fails, or lacks a method that the mode needs.
    """
    with owned_folder("root", str(config.root)):
        return _record(config)


def _record(config: RecordConfig) -> RecordSummary:
    """Run `record` in a claimed folder."""
    occupied = config.root.exists() and any(config.root.iterdir())
    if occupied and not config.resume:
        raise ConfigError(
            f"{config.root} exists; add --resume to continue it, or choose a new --root"
        )
    if occupied and not is_recording(config.root):
        raise ConfigError(
            f"{config.root} was not written by `ceed-vla record`; choose a new --root"
        )
    if config.mode == "takeover" and config.policy_path is None:
        raise ConfigError(
            "mode takeover needs --policy.path, the checkpoint folder of the policy that drives"
        )
    with (
        removed_while_empty(config.root),
        handled_by(),
        EnvPool(config.batch, config.env, config.instruction) as pool,
        open_workers(
            config.workers,
            config.cluster,
            unit_recorder,
            config,
            pool,
            checkpoints=[str(config.policy_path)] if config.policy_path else [],
        ) as workers,
    ):
        check_requirements(config, pool.env(0))
        features = frame_features(pool.env(0), config)
        try:
            name = f"local/{config.root.resolve().name}"
            env = config.env
            writer = DatasetWriter(
                config.root, repo_id=name, fps=env.fps, features=features, robot_type=env.type
            )
        except OSError as error:
            raise DatasetError(
                f"{config.root} cannot be written ({error}); free disk space, or set another root"
            ) from error
        session = _Session(config, writer)
        try:
            for attempts in workers.map(session.units()):
                session.store(attempts)
        finally:
            session.close()
    return session.summary()


def check_requirements(config: RecordConfig, env: Environment) -> None:
    """Check the requirements of a mode, without running the environment or the policy.

    Raises:
        SimulationError: The environment lacks a method.
        ConfigError: The policy's features or chunks do not fit.
        CheckpointError: The policy's configuration cannot be read.
    """
    if config.mode == "grounding":
        env.needs("mode grounding", "privileged_state", "scatter", "observe")
        if config.poses_per_scene > 1:
            env.needs("--poses_per_scene above 1", "retarget")
    if config.mode == "takeover":
        policy = CeedVLAConfig.read(resolve_checkpoint(str(config.policy_path)))
        check_features(policy, config.env)
        if (config.executed_steps or 1) > policy.chunk_size:
            raise ConfigError(
                f"executed_steps is {config.executed_steps}; the policy's chunks have "
                f"{policy.chunk_size} steps. Lower --executed_steps to that."
            )


def unit_recorder(config: RecordConfig, pool: EnvPool) -> Callable[[range], list[Attempt]]:
    """The function that records one unit of seeds in the configured mode."""
    if config.mode == "takeover":
        bundle = joined(load(config.policy_path or ""), config.env)
        runner = PolicyRunner(bundle, config.decoding, executed_steps=config.executed_steps)
        if runner.alone:
            raise ConfigError(
                f"decoding is {config.decoding}, which has a deadline; attempts share batches, but "
                "a deadline applies to a chunk alone. Choose another decoder."
            )
        return lambda seeds: takeover_attempts(runner, pool, seeds, config)
    env = pool.env(0)
    if config.mode == "grounding":
        return lambda seeds: grounding_scenes(env, seeds, config)
    return lambda seeds: [expert_attempt(env, seed, config) for seed in seeds]


def _identity(config: RecordConfig) -> dict[str, Any]:
    """Return the options that a resumed recording must share with its first run."""
    if config.mode != "takeover" or config.policy_path is None:
        return config.identity()
    return {**config.identity(), POLICY: fingerprint(str(config.policy_path))}


def recorded_policy(root: Path) -> str | None:
    """Fingerprint of the policy that drove the takeovers in `root`; None if unknown."""
    if not is_recording(root):
        return None
    found = read_progress(root)["progress"].get("config")
    policy = found.get(POLICY) if isinstance(found, dict) else None
    return policy if isinstance(policy, str) else None


class _Session:
    """The loop over units of seeds, with progress on screen and on disk."""

    def __init__(self, config: RecordConfig, writer: DatasetWriter) -> None:
        self.config, self.writer = config, writer
        stored = self._checked(writer.progress)
        self.identity = _identity(config)
        own = self.identity
        first = stored.get("config", own)
        if POLICY in own and POLICY not in first:
            logger.warning(
                "%s does not record the policy weights of its first run; %s may have others.",
                config.root,
                config.policy_path,
            )
            first = {**first, POLICY: own[POLICY]}
        if own.get(POLICY) != first.get(POLICY):
            raise ConfigError(
                f"{config.root} was recorded with a policy of fingerprint {first.get(POLICY)}, and "
                f"that of {config.policy_path} is {own.get(POLICY)}: its weights or settings have "
                "changed. Set the policy of the first run, or choose a new --root."
            )
        if changed := sorted(
            name for name in own.keys() | first.keys() if own.get(name) != first.get(name)
        ):
            raise ConfigError(
                f"{config.root} was recorded with other options ({', '.join(changed)}); repeat the "
                "first command with --resume (only --episodes may grow), or choose a new --root"
            )
        self._load(stored)
        self.bar = tqdm(
            total=config.episodes,
            initial=min(self.attempts, config.episodes),
            unit="scene" if config.mode == "grounding" else "attempt",
            desc=f"record {config.mode}",
            disable=not config.progress,
            dynamic_ncols=True,
        )
        self.started = time.perf_counter()
        self.first_frame = writer.frames

    def _checked(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Validate the progress that `_progress` wrote; it is empty for a new dataset."""
        if not stored:
            return stored
        outcomes = stored.get("outcomes")
        attempts = stored.get("attempts")
        counts: list[Any] = list(outcomes.values()) if isinstance(outcomes, dict) else [None]
        seeds = [stored.get(name) for name in ("failed_seeds", "episode_seeds")]
        lists = all(isinstance(s, list) and all(is_whole(seed, 0) for seed in s) for s in seeds)
        fits = (
            isinstance(stored.get("config"), dict)
            and lists
            and all(is_whole(n, 0) for n in [attempts, *counts])
        )
        if (
            not fits
            or sum(counts) != attempts
            or len(stored["episode_seeds"]) != self.writer.episodes
        ):
            raise DatasetError(
                f"{self.config.root / PROGRESS_FILE} is damaged: its attempts, outcomes and seeds "
                f"do not fit the {counted(self.writer.episodes, 'stored episode')}. Record into a "
                "new root."
            )
        return stored

    def _load(self, stored: dict[str, Any]) -> None:
        self.attempts: int = stored.get("attempts", 0)
        self.outcomes = Counter(stored.get("outcomes", {}))
        self.failed_seeds: list[int] = list(stored.get("failed_seeds", []))
        self.episode_seeds: list[int] = list(stored.get("episode_seeds", []))

    def units(self) -> Iterator[range]:
        """Yield the seeds of the missing units, until the time limit."""
        first, size = self.config.first_seed, self.config.unit_size
        last = first + self.config.episodes
        most = 60 * self.config.max_minutes
        for seed in range(first + self.attempts, last, size):
            if most and time.perf_counter() - self.started > most:
                return
            yield range(seed, min(seed + size, last))

    def store(self, attempts: list[Attempt]) -> None:
        """Write one unit; counters change together with the frames they count."""
        with held_back(), self._disk_errors():
            if not self.writer.has_room():
                self.writer.commit(self._progress())  # while there is still room for it
                raise OSError(errno.ENOSPC, "too little room left")
            for attempt in attempts:
                for segment in attempt.segments:
                    self.writer.add_episode(segment)
                    self.episode_seeds.append(attempt.seed)
                self.outcomes[f"{attempt.task}/{attempt.outcome}"] += 1
                if attempt.outcome in ("failed", "unfinished"):
                    self.failed_seeds.append(attempt.seed)
                self.attempts += 1
            if self.writer.pending_frames >= self.config.commit_frames:
                self.writer.commit(self._progress())
        self.bar.update(len(attempts))
        rate = (self.writer.frames - self.first_frame) / (time.perf_counter() - self.started)
        lost = len(self.failed_seeds)
        self.bar.set_postfix_str(
            f"{counted(self.writer.frames, 'frame')}, {rate:.0f} frames/s, {lost} not finished"
        )

    def summary(self) -> RecordSummary:
        """Return the contents of the dataset."""
        scenes = self.config.scenes_per_episode if self.config.mode == "grounding" else 0
        stored = self.writer.episodes, self.writer.frames
        return RecordSummary(self.config.root, *stored, self.attempts, dict(self.outcomes), scenes)

    def close(self) -> None:
        """Commit what is recorded; also after an interrupt or an error."""
        try:
            if self._progress() != self.writer.progress:
                with held_back(), self._disk_errors():
                    self.writer.commit(self._progress())
        finally:
            self.bar.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Roll back to the last commit on any failure while writing, and report it."""
        try:
            yield
        except Exception as error:
            self.writer.rollback()
            self._load(self.writer.progress)
            if not isinstance(error, OSError):
                raise
            reason = (
                "the disk is full" if error.errno == errno.ENOSPC else f"writing failed: {error}"
            )
            stored = (
                f"{counted(self.writer.episodes, 'episode')} "
                f"({counted(self.writer.frames, 'frame')})"
            )
            raise DatasetError(
                f"{self.config.root}: {reason}. Stored and readable: {stored}; free disk space and "
                "repeat the command with --resume"
            ) from error

    def _progress(self) -> dict[str, Any]:
        return {
            "config": self.identity,
            "attempts": self.attempts,
            "outcomes": dict(self.outcomes),
            "failed_seeds": self.failed_seeds,
            "episode_seeds": self.episode_seeds,
        }
