"""What training needs of the simulator: its flags, and plain callables for validation and takeover recording.

`ceed_vla.cli` joins these to `training`, which never imports `sim`. Both callables start processes with one thread
each: two such processes use two cores better than two threads in one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig
from tqdm import tqdm

from ceed_vla.errors import ConfigError, SimulationError
from ceed_vla.fields import ranged
from sim.environment import TAKEOVER_SEEDS, VALIDATION_SEED, check_expert
from sim.evaluate import CheckpointPath
from sim.grounding import GroundingConfig, grounding
from sim.processes import command, run_all
from sim.tabletop.lerobot_env import mixed_tabletop

logger = logging.getLogger(__name__)

PROCESSES = 2  # that share the episodes of a validation or a takeover round
SCENES = 400  # on which localisation is measured


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
        known = getattr(self.env, "privileged", None)
        return {
            "closed_loop": self.closed_loop("ar"),
            "record_takeover": recorder,
            "privileged": known,
            "localisation": partial(localisation, self.env) if self.grounding_gate and known else None,
        }


def localisation(env: EnvConfig, policy: Path) -> dict[str, float]:
    """Median error [m] of every position in every task on validation scenes: a `training.teacher.Localisation`."""
    config = GroundingConfig(CheckpointPath(str(policy)), SCENES, VALIDATION_SEED, env)
    return {
        f"{name.removesuffix('_p50_cm')} in {task}": value / 100
        for task, errors in grounding(config)["tasks"].items()
        for name, value in errors.items()
        if name.endswith("_p50_cm")
    }


class ClosedLoopValidation:
    """Success of a checkpoint on validation seeds: a `training.run.ClosedLoop`."""

    def __init__(self, env: EnvConfig, episodes: int = 40, decoding: str = "ar") -> None:
        self.env, self.episodes, self.decoding = env, episodes, decoding

    def __call__(self, policy: Path) -> tuple[int, int]:
        """(successes, episodes) of the checkpoint folder `policy`; a bar counts the episodes meanwhile."""
        options = {
            "policy.path": policy, "decoders": self.decoding, "seed": VALIDATION_SEED, "episodes": self.episodes,
            "batch": min(20, -(-self.episodes // PROCESSES)),
        }  # fmt: skip
        commands = [
            command("sim.worker", self.env, worker=worker, workers=PROCESSES, **options)
            for worker in range(PROCESSES if self.episodes > 1 else 1)
        ]
        outcomes = []
        with tqdm(total=self.episodes, desc="validate", unit="episode", dynamic_ncols=True) as bar:
            for line in run_all(commands):
                if line.startswith('{"decoder": '):  # environments of others may print, too
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
            words = command(
                "ceed_vla.cli", self.env, root=roots[-1], mode="takeover", episodes=count, seed=seed,
                policy_path=policy, decoding="ar", resume="true",
                progress="true" if process == 0 else "false",
            )  # fmt: skip
            commands.append([*words[:3], "record", *words[3:]])
        folder.mkdir(parents=True, exist_ok=True)
        for line in run_all(commands):
            logger.info(line.strip())
        return roots


def _shares(total: int) -> list[tuple[int, int]]:
    """(first, count) of the episodes of each process, nearly equally many; empty ranges are left out."""
    edges = [total * i // PROCESSES for i in range(PROCESSES + 1)]
    return [(a, b - a) for a, b in pairwise(edges) if b > a]
