"""Meta-World as LeRobot's environment, rendered fast: `--env.type=ceed_metaworld --env.task=mt10`.

Observations, tasks, success and seeds are those of LeRobot's own `metaworld`, whose images are of
480 x 480 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gymnasium.vector import VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig, MetaworldEnv
from numpy.typing import NDArray

from ceed_vla.extras import require
from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.sim.env_tasks import MIXED
from ceed_vla.sim.environment import Privileged
from ceed_vla.sim.metaworld import ENV_ID, MAX_EPISODE_STEPS
from ceed_vla.sim.metaworld.tasks import ALL_TASKS, LARGEST_IMAGE, PRIVILEGED_NAMES, TASKS
from ceed_vla.sim.suites import suite_per_task
from ceed_vla.sim.task_names import parse_tasks

MOST_SIMULATIONS = 200  # in a process; each takes 20 to 45 MB


@EnvConfig.register_subclass("ceed_metaworld")
@dataclass
class CeedMetaworldEnv(MetaworldEnv):
    """Meta-World's tasks by language.

    Attributes:
        task: "mt10", "all" (50 tasks) or a comma-separated list; these cycle over the seeds (in
            LeRobot's tools: a suite each). "mixed": the environment draws a task of MT10 for every
            episode.
        fps: Control rate [Hz]; Meta-World's is fixed.
        episode_length: Step limit of an episode.
        image_size: Side of the camera image [px].
    """

    privileged: ClassVar[Privileged] = Privileged(
        PRIVILEGED_NAMES, scale=(30.0,) * 6, named=6, positions={"object": (0, 3), "target": (3, 6)}
    )

    task: str = "mt10"
    fps: int = ranged(80, "[80, 80]")
    obs_type: str = chosen("pixels_agent_pos", ("pixels_agent_pos",))
    episode_length: int = ranged(MAX_EPISODE_STEPS, "[1, 500]")  # Meta-World ends itself at 500
    image_size: int = ranged(96, f"[16, {LARGEST_IMAGE}]")

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()
        shape = (self.image_size, self.image_size, 3)
        self.features["pixels/top"] = PolicyFeature(type=FeatureType.VISUAL, shape=shape)
        self.tasks()
        require("--env.type=ceed_metaworld", "metaworld")

    @property
    def gym_id(self) -> str:
        return ENV_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keywords of `gymnasium.make`."""
        return {
            "tasks": self.tasks(),
            "image_size": self.image_size,
            "max_episode_steps": self.episode_length,
        }

    @property
    def most_envs(self) -> int:
        """Environments that fit into a process; each keeps a simulation per task."""
        return max(1, MOST_SIMULATIONS // len(self.tasks()))

    def tasks(self) -> list[str]:
        """Tasks to cycle over the seeds; `ConfigError` for an unknown one."""
        sets = {"mt10": TASKS, MIXED: TASKS, "all": ALL_TASKS}
        choose = f"'mt10', 'mixed', 'all' or some of {', '.join(ALL_TASKS)}"
        return parse_tasks(self.task or "", sets, choose)

    def act(self, env: Any) -> NDArray[Any]:
        """Action (4,) of Meta-World's scripted expert."""
        return env.expert_action()

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, VectorEnv]]:
        """One vector environment per task, for LeRobot's tools: {task: {0: env}}."""
        return suite_per_task(self, n_envs, use_async_envs)
