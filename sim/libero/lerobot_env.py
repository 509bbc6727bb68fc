"""LIBERO as LeRobot's environment, rendered on demand: `--env.type=ceed_libero`.

Observations, tasks, initial states and success are those of LeRobot's own `libero`, which is not
changed. Images are turned already and the state is one vector, as LeRobot's processors return them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from gymnasium.vector import VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from numpy.typing import NDArray

from ceed_vla.fields import check_fields, chosen, ranged
from ceed_vla.sim.environment import Privileged
from ceed_vla.sim.libero import ENV_ID
from ceed_vla.sim.libero.installation import check_installed
from ceed_vla.sim.libero.tasks import (
    ACTION_NAMES,
    CAMERAS,
    CONTROL_RATE,
    HORIZONS,
    OFFICIAL_STATES,
    PRIVILEGED_NAMES,
    RENDERED,
    STATE_NAMES,
    suite_of,
    tasks_of,
)
from ceed_vla.sim.suites import suite_per_task


@EnvConfig.register_subclass("ceed_libero")
@dataclass
class CeedLiberoEnv(EnvConfig):
    """LIBERO's tasks by language; needs the extra `libero`.

    Attributes:
        task: A suite (libero_object, libero_spatial, libero_goal, libero_10), or some of its tasks,
            such as "libero_object/0,libero_object/3"; these cycle over the seeds (in LeRobot's
            tools: a suite each).
        fps: Control rate [Hz]; LIBERO's is fixed.
        states: Initial states: "official", the 50 of each task, which are for evaluation; or
            "sampled", which LIBERO draws with the seed, for data, training and choices. With
            "official", consecutive seeds from a multiple of the number of tasks take every state of
            every task once.
        quality: Images: "official", LIBERO's own; or "fast", without multisampling and with
            simplified meshes, for data.
        episode_length: Step limit of an episode; 0: the suite's.
        image_size: Side of the camera images [px]; they are rendered with 256 and reduced.
    """

    privileged: ClassVar[Privileged] = Privileged(
        PRIVILEGED_NAMES, scale=(30.0,) * 6, named=6, positions={"object": (0, 3), "target": (3, 6)}
    )

    most_envs: ClassVar[int] = 1  # each keeps a simulation per task

    task: str | None = "libero_object"
    fps: int = ranged(CONTROL_RATE, f"[{CONTROL_RATE}, {CONTROL_RATE}]")
    states: str = chosen("official", ("official", "sampled"))
    quality: str = chosen("official", ("official", "fast"))
    episode_length: int = ranged(0, "[0, 10000]")
    image_size: int = ranged(RENDERED, f"[16, {RENDERED}]")
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        tasks = self.tasks()
        check_installed()
        self.episode_length = self.episode_length or HORIZONS[suite_of(tasks[0])]
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(ACTION_NAMES),)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(len(STATE_NAMES),)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        shape = (self.image_size, self.image_size, 3)
        for camera in CAMERAS:
            self.features[f"pixels/{camera}"] = PolicyFeature(type=FeatureType.VISUAL, shape=shape)
            self.features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"

    @property
    def gym_id(self) -> str:
        return ENV_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keywords of `gymnasium.make`."""
        return {
            "tasks": self.tasks(),
            "states": self.states,
            "image_size": self.image_size,
            "quality": self.quality,
            "max_episode_steps": self.episode_length,
        }

    @property
    def evaluation_only(self) -> bool:
        """Whether the initial states are the official ones."""
        return self.states == "official"

    @property
    def distinct_episodes(self) -> int | None:
        """Number of different episodes; None if seeds draw them."""
        return OFFICIAL_STATES * len(self.tasks()) if self.evaluation_only else None

    def tasks(self) -> list[str]:
        """Tasks to cycle over the seeds; `ConfigError` for an unknown one."""
        return tasks_of(self.task or "")

    def act(self, env: Any) -> NDArray[Any]:
        """Action (7,) of the scripted expert."""
        return env.expert_action()

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, VectorEnv]]:
        """One vector environment per task, for LeRobot's tools: {task: {0: env}}."""
        return suite_per_task(self, n_envs, use_async_envs)
