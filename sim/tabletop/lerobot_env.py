"""The tabletop as a LeRobot environment: `--env.type=ceed_tabletop --env.task=all`.

Importing this module registers the type. The distribution `lerobot_policy_ceed_vla` imports it for
LeRobot's tools; without that distribution, pass
`--env.discover_packages_path=ceed_vla.sim.tabletop.lerobot_env`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from numpy.typing import NDArray

from ceed_vla.errors import ConfigError
from ceed_vla.fields import check_fields, chosen, ranged, short
from ceed_vla.sim.env_tasks import MIXED
from ceed_vla.sim.environment import Privileged
from ceed_vla.sim.suites import suites
from ceed_vla.sim.tabletop import ENV_ID, MAX_EPISODE_STEPS
from ceed_vla.sim.tabletop.tasks import CAMERAS, COLORS, MAX_IMAGE_SIZE, SPLITS, TASKS

_ACTION_DIM, _STATE_DIM = 7, 14
_NAMES = (
    *("target_dx", "target_dy", "target_dz", "target_cos_4yaw", "target_sin_4yaw"),
    *("goal_dx", "goal_dy", "goal_dz"),
    *(f"{thing}_{part}" for thing in (*COLORS, "bin", "plate") for part in ("x", "y", "z", "yaw")),
)
# The named cube and goal relative to the gripper, in units of 3 cm; then all objects in decimetres.
# With the named ones alone, a policy learns positions far more slowly. Yaws have a small weight: at
# 96 px they are mostly noise, which would drown the centimetres that a stack needs.
_NAMED_SCALE = (30.0, 30.0, 30.0, 0.3, 0.3, 30.0, 30.0, 30.0)
_OBJECTS_SCALE = (10.0, 10.0, 1.0, 0.1) * 6
PRIVILEGED = Privileged(
    names=_NAMES,
    scale=(*_NAMED_SCALE, *_OBJECTS_SCALE),
    named=len(_NAMED_SCALE),
    positions={"target": (0, 3), "goal": (5, 8)},
)


@EnvConfig.register_subclass("ceed_tabletop")
@dataclass
class CeedTabletopEnv(EnvConfig):
    """Tabletop manipulation by language, four task families.

    Attributes:
        task: "all" or a comma-separated list of families; these cycle over the seeds (in LeRobot's
            tools: a suite each). "mixed": the environment draws the family of every episode
            (recordings still cycle).
        fps: Control rate [Hz].
        split: Combinations of colours and phrasings: "train", "heldout" or "all".
        episode_length: Step limit of an episode.
        image_size: Side of the camera images [px].
        cameras: Names of the cameras, in `observation.images.<name>`.
    """

    privileged: ClassVar[Privileged] = PRIVILEGED
    # the front camera faces the robot
    sides: ClassVar[tuple[str, str]] = ("robot's right", "robot's left")

    task: str | None = "all"
    fps: int = ranged(10, "[10, 10]")
    split: str = chosen("train", SPLITS)
    episode_length: int = ranged(MAX_EPISODE_STEPS, "[1, 100000]")
    image_size: int = ranged(96, f"[16, {MAX_IMAGE_SIZE}]")
    cameras: list[str] = field(default_factory=lambda: list(CAMERAS))
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        self.families()
        if (
            not self.cameras
            or len(set(self.cameras)) < len(self.cameras)
            or set(self.cameras) - set(CAMERAS)
        ):
            raise ConfigError(
                f"cameras are {str(self.cameras)[:200]}; choose some of {', '.join(CAMERAS)}."
            )
        size = self.image_size
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(_ACTION_DIM,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(_STATE_DIM,)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        for camera in self.cameras:
            self.features[f"pixels/{camera}"] = PolicyFeature(
                type=FeatureType.VISUAL, shape=(size, size, 3)
            )
            self.features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"

    @property
    def gym_id(self) -> str:
        """The one registered id; the family is a keyword."""
        return ENV_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keywords of `gymnasium.make`; with several families, `create_envs` sets each `task`."""
        names = self.families()
        return {
            "task": names[0] if len(names) == 1 else MIXED,
            "families": tuple(names) if len(names) > 1 else TASKS,
            "split": self.split,
            "image_size": self.image_size,
            "cameras": tuple(self.cameras),
            "render_mode": "rgb_array",
            "max_episode_steps": self.episode_length,
        }

    def families(self) -> list[str]:
        """Values of the environment's `task` keyword, one per suite; `ConfigError` if unknown."""
        names = [name.strip() for name in (self.task or "all").split(",") if name.strip()]
        if names == ["all"]:
            return list(TASKS)
        unknown = [name for name in names if name not in (*TASKS, MIXED)]
        if unknown or not names:
            raise ConfigError(
                f"unknown task {short(', '.join(unknown) or self.task)}; choose 'all', 'mixed' or "
                f"a comma-separated list of {', '.join(TASKS)}"
            )
        return names

    def tasks(self) -> list[str]:
        """Families that a recording cycles over its seeds."""
        return list(TASKS) if self.task == MIXED else self.families()

    def act(self, env: Any) -> NDArray[np.float32]:
        """Action (7,) of the scripted expert."""
        return env.expert_action()

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, VectorEnv]]:
        """One vector environment per family: {suite: {0: env}}, the suite named like the family."""
        make = partial(gymnasium.make, ENV_ID, disable_env_checker=True, **self.gym_kwargs)
        return suites(
            {name: partial(make, task=name) for name in self.families()}, n_envs, use_async_envs
        )


def mixed_tabletop() -> CeedTabletopEnv:
    """The tabletop of evaluations: every seed draws its family."""
    return CeedTabletopEnv(task=MIXED)
