"""What training needs of the simulator: its flags, and plain callables for validation and takeover recording.

`ceed_vla.cli` joins these to `training`, which never imports `sim`. Both callables start processes with one thread
each: two such processes use two cores better than two threads in one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from lerobot.envs.configs import EnvConfig
from tqdm import tqdm

from ceed_vla.discovery import FLAG, discovered
from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.fields import ranged
from sim.environment import TAKEOVER_SEEDS, VALIDATION_SEED, check_expert, flags
from sim.tabletop.lerobot_env import mixed_tabletop

logger = logging.getLogger(__name__)

PROCESSES = 2  # that share the episodes of a validation or a takeover round


@EnvConfig.register_subclass("none")
@dataclass
class NoEnv(EnvConfig):
    """No simulator: training neither validates nor records takeovers."""

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}


@dataclass
class StudentSimulation:
    """The flags by which `distill` uses a simulator.

    Attributes:
        env: Where policies are validated and takeovers recorded; none: neither is done.
        validate_episodes: Episodes of every validation; 0 for none.
    """

    env: EnvConfig = field(default_factory=mixed_tabletop)
    validate_episodes: int = ranged(40, "[0, 10000]")

    def arguments(self) -> dict[str, Any]:
        """What the command's function takes besides the configuration."""
        return {"closed_loop": self.closed_loop("ceed")}

    def closed_loop(self, decoding: str) -> ClosedLoopValidation | None:
        """How a policy is validated, where it is."""
        validated = self.validate_episodes and self.env.type != "none"
        return ClosedLoopValidation(self.env, self.validate_episodes, decoding) if validated else None


class TeacherSimulation(StudentSimulation):
    """The flags by which `train` uses a simulator."""

    def arguments(self: Any) -> dict[str, Any]:
        if self.env.type == "none":
            self.rounds = 0
        recorder = None
        if self.rounds:
            recorder = TakeoverRecorder(self.env, self.takeover_episodes, self.takeover_seed, self.rounds)
        return {
            "closed_loop": self.closed_loop("ar"),
            "record_takeover": recorder,
            "privileged": getattr(self.env, "privileged", None),
        }


class ClosedLoopValidation:
    """Success of a checkpoint on validation seeds: a `training.run.ClosedLoop`."""

    def __init__(self, env: EnvConfig, episodes: int = 40, decoding: str = "ar") -> None:
        self.env, self.episodes, self.decoding = env, episodes, decoding

    def __call__(self, policy: Path) -> tuple[int, int]:
        """(successes, episodes) of the checkpoint folder `policy`; a bar counts the episodes meanwhile."""
        commands = [
            _command(
                "sim.validate", self.env, policy_path=policy, seed=VALIDATION_SEED + first, episodes=count,
                decoding=self.decoding,
            )
            for first, count in _shares(self.episodes)
        ]  # fmt: skip
        outcomes = []
        with tqdm(total=self.episodes, desc="validate", unit="episode", dynamic_ncols=True) as bar:
            for line in _run_all(commands):
                if line.startswith('{"success": '):  # environments of others may print, too
                    outcomes.append(json.loads(line)["success"])
                    bar.update()
                    bar.set_postfix_str(f"{sum(outcomes)} solved")
        if len(outcomes) != self.episodes:
            raise SimulationError(
                f"A validation of {policy} reported {len(outcomes)} of {self.episodes} episodes; see above."
            )
        return sum(outcomes), len(outcomes)


class TakeoverRecorder:
    """Records one takeover (DAgger) round: a `training.teacher.RecordTakeover`.

    Args:
        episodes: Attempts a round.
        seed: Seed of the first attempt of round 0; every attempt has its own.

    Raises:
        ConfigError: The rounds leave the seeds for takeovers, or there is no expert.
    """

    def __init__(self, env: EnvConfig, episodes: int, seed: int, rounds: int) -> None:
        check_expert(env, f"--rounds {rounds} (takeovers)")
        low, high = TAKEOVER_SEEDS
        if not low <= seed <= high - rounds * episodes:
            raise ConfigError(
                f"--takeover_seed is {seed}: {rounds} rounds of {episodes} takeovers would leave the seeds "
                f"{low} to {high - 1}. Choose another first seed, or fewer takeovers."
            )
        self.env, self.episodes, self.seed = env, episodes, seed

    def __call__(self, policy: Path, index: int, folder: Path) -> list[Path]:
        """Record round `index` with the checkpoint `policy` into new roots under `folder`; resumes broken ones."""
        roots, commands = [], []
        for process, (first, count) in enumerate(_shares(self.episodes)):
            roots.append(folder / f"round_{index}_{process}")
            seed = self.seed + index * self.episodes + first
            command = _command(
                "ceed_vla.cli", self.env, root=roots[-1], mode="takeover", episodes=count, seed=seed,
                policy_path=policy, decoding="ar", resume="true",
                progress="true" if process == 0 else "false",
            )  # fmt: skip
            commands.append([*command[:3], "record", *command[3:]])
        folder.mkdir(parents=True, exist_ok=True)
        for line in _run_all(commands):
            logger.info(line.strip())
        return roots


def _command(module: str, env: EnvConfig, **options: Any) -> list[str]:
    """``python -m module --option=value ...``, with the environment's flags and the packages that were discovered."""
    packages = {FLAG: ",".join(discovered())} if discovered() else {}
    words = [f"--{name}={value}" for name, value in {**options, **packages}.items()]
    return [sys.executable, "-m", module, *words, *flags(env)]


def _shares(total: int) -> list[tuple[int, int]]:
    """(first, count) of the episodes of each process, nearly equally many; empty ranges are left out."""
    edges = [total * i // PROCESSES for i in range(PROCESSES + 1)]
    return [(a, b - a) for a, b in pairwise(edges) if b > a]


def _run_all(commands: Sequence[Sequence[str]]) -> Iterator[str]:
    """Run all commands side by side and yield the lines that they print.

    Raises:
        SimulationError: One of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands]
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read(process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    try:
        for process in running:
            Thread(target=read, args=(process,), daemon=True).start()
        for _ in running:
            while (line := lines.get()) is not None:
                yield line
        for command, process in zip(commands, running, strict=True):
            if process.wait():
                raise SimulationError(
                    f"{' '.join(command[1:])} failed with exit status {process.returncode}; see above."
                )
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
