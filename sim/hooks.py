"""The simulator's part of training: flags, and callables for validation and takeover recording.

`ceed_vla.cli` passes them to `training`, which never imports `sim`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lerobot.envs.configs import EnvConfig
from tqdm import tqdm

from ceed_vla.checkpoint_files import fingerprint
from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.errors import ConfigError
from ceed_vla.fields import ranged
from ceed_vla.folders import resolve_checkpoint
from ceed_vla.sim.decoders import resolve_rows
from ceed_vla.sim.env_tasks import check_expert, check_open, has_expert
from ceed_vla.sim.environment import TAKEOVER_SEEDS, VALIDATION_SEED, EnvPool, check_features
from ceed_vla.sim.evaluation import batch_runner, batches
from ceed_vla.sim.evaluation_config import EvalConfig
from ceed_vla.sim.grounding import GroundingConfig, grounding
from ceed_vla.sim.record import record, recorded_policy
from ceed_vla.sim.recording.config import RecordConfig
from ceed_vla.sim.settings import CheckpointPath
from ceed_vla.sim.tabletop.lerobot_env import mixed_tabletop
from ceed_vla.workers import ClusterConfig, open_workers

logger = logging.getLogger(__name__)

PROCESSES = 2  # processes that share the episodes of a validation or a takeover round
LONG_ENOUGH = 10.0  # [minutes] shortest time budget with a takeover round
SCENES = 400  # scenes on which localisation is measured


@EnvConfig.register_subclass("none")
@dataclass
class NoEnv(EnvConfig):
    """No simulator: training neither validates nor records takeovers."""

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}


@dataclass
class StudentSimulation:
    """Simulator flags of `distill`.

    Attributes:
        env: Environment for validation and takeover recording; none: neither is done.
        instruction: Instruction for the policy in it, if the environment has none or its words
            differ from those of the data.
        validate_episodes: Episodes per validation; 0: no validation.
        cluster: Ray cluster that runs the episodes of validations and takeovers; otherwise two
            processes of this machine do.
    """

    env: EnvConfig = field(default_factory=mixed_tabletop)
    instruction: str = ""
    validate_episodes: int = ranged(40, "[0, 10000]")
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the command's function besides the configuration."""
        return {"closed_loop": self.closed_loop("ceed")}

    def closed_loop(self, decoding: str) -> ClosedLoopValidation | None:
        """Return the validation with a decoder; None if validation is off."""
        validated = self.validate_episodes and self.env.type != "none"
        return (
            ClosedLoopValidation(
                self.env, self.validate_episodes, decoding, self.instruction, self.cluster
            )
            if validated
            else None
        )


class TeacherSimulation(StudentSimulation):
    """Simulator flags of `train`."""

    def arguments(self: Any) -> dict[str, Any]:
        if self.env.type == "none":
            self.rounds = 0
        elif self.rounds is None:  # a time budget is set
            self.rounds = int(has_expert(self.env) and self.max_minutes >= LONG_ENOUGH)
        recorder = None
        if self.rounds:
            episodes, seed = self.takeover_episodes, self.takeover_seed
            recorder = TakeoverRecorder(
                self.env, episodes, seed, self.rounds, self.instruction, self.cluster
            )
        known = getattr(self.env, "privileged", None)
        if self.grounding_gate and known:
            check_open(self.env, "The gate of --grounding_gate")
        located = partial(localisation, self.env, instruction=self.instruction)
        return {
            "closed_loop": self.closed_loop("ar"),
            "record_takeover": recorder,
            "privileged": known,
            "localisation": located if self.grounding_gate and known else None,
        }


def localisation(env: EnvConfig, policy: Path, instruction: str = "") -> dict[str, float]:
    """Return the median error [m] of every position in every task, on validation scenes.

    Implements `ceed_vla.training.teacher.Localisation`.
    """
    config = GroundingConfig(
        CheckpointPath(str(policy)), env, SCENES, VALIDATION_SEED, instruction=instruction
    )
    return {
        f"{name.removesuffix('_p50_cm')} in {task}": value / 100
        for task, errors in grounding(config)["tasks"].items()
        for name, value in errors.items()
        if name.endswith("_p50_cm")
    }


class ClosedLoopValidation:
    """Measures success on validation seeds; a `ceed_vla.training.run.ClosedLoop`."""

    def __init__(
        self,
        env: EnvConfig,
        episodes: int = 40,
        decoding: str = "ar",
        instruction: str = "",
        cluster: ClusterConfig | None = None,
    ) -> None:
        self.env = env
        self.episodes = episodes
        self.decoding = decoding
        self.instruction = instruction
        self.cluster = cluster or ClusterConfig()

    def check(self, policy: CeedVLAConfig) -> None:
        """Raise `ConfigError`, before training, if features or initial states do not fit."""
        check_open(self.env, "Validation")
        check_features(policy, self.env)

    def __call__(self, policy: Path) -> tuple[int, int]:
        """Return (successes, episodes) of the checkpoint folder `policy`; show a progress bar."""
        config = EvalConfig(
            CheckpointPath(str(policy)),
            env=self.env,
            decoders=self.decoding,
            episodes=self.episodes,
            seed=VALIDATION_SEED,
            batch=min(20, -(-self.episodes // PROCESSES)),
            instruction=self.instruction,
        )
        outcomes: dict[int, bool] = {}  # by seed
        with (
            tqdm(total=self.episodes, desc="validate", unit="episode", dynamic_ncols=True) as bar,
            open_workers(
                PROCESSES,
                self.cluster,
                batch_runner,
                config,
                EnvPool(config.batch, self.env, self.instruction),
                checkpoints=config.paths,
            ) as workers,
        ):
            (row,) = resolve_rows(
                [self.decoding], {"policy": CeedVLAConfig.read(resolve_checkpoint(policy))}
            )
            for _, episode in workers.stream([(row, batch) for batch in batches(config)]):
                bar.update(episode.seed not in outcomes)
                outcomes[episode.seed] = episode.success
                bar.set_postfix_str(f"{sum(outcomes.values())} solved")
        return sum(outcomes.values()), len(outcomes)


class TakeoverRecorder:
    """Records one takeover (DAgger) round: a `ceed_vla.training.teacher.RecordTakeover`.

    Args:
        env: Environment, which must have an expert.
        episodes: Attempts per round.
        seed: Seed of the first attempt of round 0; every attempt has its own.
        rounds: Number of rounds.
        instruction: Instruction that overrides the environment's.
        cluster: Ray cluster that runs the attempts; None: processes of this machine.

    Raises:
        ConfigError: The rounds need seeds outside the takeover range, or there is no expert.
    """

    def __init__(
        self,
        env: EnvConfig,
        episodes: int,
        seed: int,
        rounds: int,
        instruction: str = "",
        cluster: ClusterConfig | None = None,
    ) -> None:
        check_expert(env, f"--rounds {rounds} (takeovers)")
        check_open(env, "Recording takeovers (--rounds)")
        low, high = TAKEOVER_SEEDS
        if not low <= seed <= high - rounds * episodes:
            raise ConfigError(
                f"--takeover_seed is {seed}: {rounds} rounds of {episodes} takeovers must stay "
                f"within the seeds {low} to {high - 1}. Lower the seed, or record fewer takeovers."
            )
        self.env = env
        self.episodes = episodes
        self.seed = seed
        self.instruction = instruction
        self.cluster = cluster or ClusterConfig()

    def __call__(self, policy: Path, index: int, folder: Path, minutes: float = 0.0) -> list[Path]:
        """Record round `index` with the checkpoint `policy` into a new root under `folder`.

        A positive `minutes` is a time limit: the round records as many takeovers as fit. An
        interrupted round is resumed if its policy had the same weights; they differ if training
        itself was resumed from an earlier state.
        """
        folder.mkdir(parents=True, exist_ok=True)
        root = folder / f"round_{index}"
        seed = self.seed + index * self.episodes
        recorded = recorded_policy(root)
        if recorded is not None and recorded != fingerprint(str(policy)):
            logger.warning(
                "%s has takeovers of a policy with other weights; they are not used.", root
            )
            root = folder / f"round_{index}_{fingerprint(str(policy))}"
        config = RecordConfig(
            root,
            self.env,
            self.episodes,
            "takeover",
            seed,
            resume=True,
            workers=PROCESSES,
            cluster=self.cluster,
            instruction=self.instruction,
            policy_path=policy.resolve(),
            max_minutes=minutes,
        )
        logger.info("%s", summary := record(config))
        return [root] if summary.frames else []
