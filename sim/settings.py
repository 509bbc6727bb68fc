"""What the commands share that run a policy in an environment."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch
from lerobot.envs.configs import EnvConfig

from ceed_vla.errors import ConfigError
from ceed_vla.fields import Checked, ranged
from ceed_vla.sim.tabletop.lerobot_env import mixed_tabletop


@dataclass
class CheckpointPath(Checked, prefix="the checkpoint's "):
    """Where a checkpoint lies.

    Attributes:
        path: Checkpoint folder, or "teacher" / "student" for the shipped ones.
    """

    path: str = ""

    def given(self) -> str:
        """The policy's path; `ConfigError` if there is none."""
        if not self.path:
            raise ConfigError(
                "--policy.path is missing; give a checkpoint folder, or student or teacher for the "
                "shipped ones."
            )
        return self.path


@dataclass
class DrivenConfig(Checked, prefix="--"):
    """What the options of all commands share that run a policy in an environment.

    Attributes:
        policy: The policy.
        env: The environment; its tasks take turns over the seeds, or it draws them
            (env.task=mixed).
        instruction: What the policy is told, where the environment says nothing or other words than
            the data.
        threads: Threads of torch; None leaves torch's choice.
    """

    policy: CheckpointPath = field(default_factory=CheckpointPath)
    env: EnvConfig = field(default_factory=mixed_tabletop)
    _: KW_ONLY
    instruction: str = ""
    threads: int | None = ranged(None, "[1, 256]")

    def limit_threads(self) -> None:
        """As `threads` says."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
