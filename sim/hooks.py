"""What training needs of the simulator, as plain callables: closed-loop validation and takeover recording.

`ceed_vla.cli` hands these to `training`, which never imports `sim`. Both start `python -m sim....` processes with one
thread each: two such processes use two cores better than two threads in one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ceed_vla.errors import ConfigError, SimulationError
from sim.recording.config import TAKEOVER_SEEDS

logger = logging.getLogger(__name__)

VALIDATION_SEED = 40_000


class ClosedLoopValidation:
    """Success of a checkpoint on validation seeds: a `training.teacher.ClosedLoop`.

    Args:
        episodes: Episodes a validation; 0 skips it.
        decoding: Decoder to validate with.
        processes: Processes that share the episodes.
    """

    def __init__(self, episodes: int = 40, decoding: str = "ar", processes: int = 2) -> None:
        self.episodes, self.decoding, self.processes = episodes, decoding, processes

    def __call__(self, policy: Path) -> tuple[int, int]:
        """(successes, episodes) of the checkpoint folder `policy`."""
        shares = _shares(self.episodes, self.processes)
        commands = [
            [
                sys.executable,
                "-m",
                "sim.validate",
                str(policy),
                str(VALIDATION_SEED + first),
                str(count),
                self.decoding,
            ]
            for first, count in shares
        ]
        try:
            counts = [json.loads(text.strip().splitlines()[-1]) for text in _run_all(commands)]
            return sum(count["successes"] for count in counts), sum(count["episodes"] for count in counts)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise SimulationError(
                f"A validation of {policy} printed no result ({error!r}); see above."
            ) from error


class TakeoverRecorder:
    """Records one takeover (DAgger) round: a `training.teacher.RecordTakeover`.

    Args:
        episodes: Attempts a round.
        seed: Seed of the first attempt of round 0; every attempt has its own.
        rounds: Rounds to come.
        decoding: Decoder of the driving policy.
        processes: Processes, each with a data set of its own.
        tasks: Task families, as `ceed-vla record` takes them.

    Raises:
        ConfigError: The rounds leave the seeds for takeovers.
    """

    def __init__(
        self,
        episodes: int,
        seed: int,
        rounds: int,
        decoding: str = "ar",
        processes: int = 2,
        tasks: str = "all",
    ) -> None:
        low, high = TAKEOVER_SEEDS
        if not low <= seed <= high - rounds * episodes:
            raise ConfigError(
                f"--takeover_seed is {seed}: {rounds} rounds of {episodes} takeovers would leave the seeds "
                f"{low} to {high - 1}. Choose another first seed, or fewer takeovers."
            )
        self.episodes, self.seed = episodes, seed
        self.decoding, self.processes, self.tasks = decoding, processes, tasks

    def __call__(self, policy: Path, index: int, folder: Path) -> list[Path]:
        """Record round `index` with the checkpoint `policy` into new roots under `folder`; resumes broken ones."""
        roots, commands = [], []
        for process, (first, count) in enumerate(_shares(self.episodes, self.processes)):
            root = folder / f"round_{index}_{process}"
            options = {
                "root": root,
                "mode": "takeover",
                "tasks": self.tasks,
                "episodes": count,
                "seed": self.seed + index * self.episodes + first,
                "policy_path": policy,
                "decoding": self.decoding,
                "resume": "true",
                "progress": "true" if process == 0 else "false",
            }
            roots.append(root)
            commands.append([sys.executable, "-m", "sim.record", *(f"--{k}={v}" for k, v in options.items())])
        folder.mkdir(parents=True, exist_ok=True)
        for line in _run_all(commands):
            logger.info(line.strip())
        return roots


def _shares(total: int, parts: int) -> list[tuple[int, int]]:
    """(first, count) of `parts` nearly equal ranges of `total`; empty ones are left out."""
    edges = [total * i // parts for i in range(parts + 1)]
    return [(a, b - a) for a, b in pairwise(edges) if b > a]


def _run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run all commands side by side; their standard outputs.

    Raises:
        SimulationError: One of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands]
    try:
        outputs = [process.communicate()[0] for process in running]
    except BaseException:
        for process in running:
            process.terminate()
        raise
    for command, process in zip(commands, running, strict=True):
        if process.returncode:
            raise SimulationError(
                f"{' '.join(command[1:])} failed with exit status {process.returncode}; see above."
            )
    return outputs
