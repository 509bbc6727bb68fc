"""Options shared by the commands that run a policy in an environment."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from lerobot.envs.configs import EnvConfig

from ceed_vla.checkpoints.manifest import read_config
from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked, ranged
from ceed_vla.folders import resolve_checkpoint
from ceed_vla.scheduling import place_torch
from ceed_vla.sim.tabletop.lerobot_env import mixed_tabletop


@dataclass
class CheckpointPath(Checked, prefix="the checkpoint's "):
    """The path of a checkpoint.

    Attributes:
        path: Checkpoint folder, or "teacher" / "student" for the shipped ones.
    """

    path: str = ""

    def given(self) -> str:
        """Return the policy's path; raise `ConfigError` if it is not set."""
        if not self.path:
            raise ConfigError(
                "--policy.path is missing; give a checkpoint folder, or student or teacher for the "
                "shipped ones."
            )
        return self.path


@dataclass
class DrivenConfig(Checked, prefix="--"):
    """Options of every command that runs a policy in an environment.

    Attributes:
        policy: The policy.
        env: The environment; its tasks cycle over the seeds, or it draws them (env.task=mixed).
        instruction: Instruction for the policy, if the environment has none or its words differ
            from those of the data.
        threads: CPU threads of a forward; None: torch's default.
        pin: Cores of these threads: auto, none, or one core for each thread, such as 2,3.
    """

    policy: CheckpointPath = field(default_factory=CheckpointPath)
    env: EnvConfig = field(default_factory=mixed_tabletop)
    _: KW_ONLY
    instruction: str = ""
    threads: int | None = ranged(None, "[1, 256]")
    pin: str = "auto"

    def place_threads(self) -> None:
        """Apply `threads` to torch, and `pin` if the policy runs on a CPU."""
        device = getattr(self, "device", None)
        if device is None:
            device = read_config(resolve_checkpoint(self.policy.given())).get("device")
        place_torch(self.threads, self.pin if device in (None, "cpu") else "none")
