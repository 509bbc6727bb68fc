"""An environment in one file: move a point to the goal in the instruction, with one camera."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from ceed_vla.sim.environment import Privileged

COLORS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
PHRASES = {"train": "go to the {}", "heldout": "reach the {}"}
STEP, REACHED = 0.1, 0.08  # length of a full action, distance from the goal at success [m]


class PointReach(gymnasium.Env):
    """Action (2,) in [-1, 1]: a step. Observation: an image, and the position of the point [m]."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_names, state_names = ("dx", "dy"), ("x", "y")

    def __init__(
        self, split: str = "train", image_size: int = 32, render_mode: str = "rgb_array"
    ) -> None:
        self.split = split
        self.size = image_size
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        pixels = spaces.Dict({"top": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)})
        self.observation_space = spaces.Dict(
            {"pixels": pixels, "agent_pos": spaces.Box(-1, 1, (2,), np.float32)}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.color = (options or {}).get("task") or str(self.np_random.choice(list(COLORS)))
        self.goals = dict(zip(COLORS, self.np_random.uniform(-0.9, 0.9, (2, 2)), strict=True))
        self.point = self.np_random.uniform(-0.9, 0.9, 2)
        return self.observe(), {"is_success": self.is_success(), "task": self.color}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.advance(action)
        return (
            self.observe(),
            float(self.is_success()),
            self.is_success(),
            False,
            {"is_success": self.is_success()},
        )

    def render(self) -> Any:
        image = np.full((self.size, self.size, 3), 230, np.uint8)
        for place, color in [
            *((self.goals[name], COLORS[name]) for name in COLORS),
            (self.point, (0, 0, 0)),
        ]:
            column, row = np.clip(
                ((place * [1, -1] + 1) / 2 * self.size).astype(int), 1, self.size - 2
            )
            image[row - 1 : row + 2, column - 1 : column + 2] = color
        return image

    # Methods for `record` and `grounding` besides gymnasium's; see sim/environment.py.

    @property
    def task_description(self) -> str:
        return PHRASES[self.split].format(self.color)

    def observe(self) -> dict[str, Any]:
        return {"pixels": {"top": self.render()}, "agent_pos": self.point.astype(np.float32)}

    def advance(self, action: Any) -> None:
        self.point = np.clip(self.point + STEP * np.clip(action, -1, 1), -1, 1)

    def is_success(self) -> bool:
        return bool(np.linalg.norm(self.goals[self.color] - self.point) < REACHED)

    def privileged_state(self) -> Any:
        return (self.goals[self.color] - self.point).astype(np.float32)

    def scatter(self, rng: np.random.Generator) -> None:
        self.point = rng.uniform(-0.9, 0.9, 2)

    def retarget(self, rng: np.random.Generator) -> None:
        self.color = str(rng.choice(list(COLORS)))


gymnasium.register("own_env/PointReach-v0", PointReach)


@EnvConfig.register_subclass("point_reach")
@dataclass
class PointReachConfig(EnvConfig):
    """Reach the goal of the named colour.

    Attributes:
        task: A colour, "all" (colours in turn), or "mixed" (drawn at every reset).
        split: Phrases: "train" or "heldout".
        episode_length: Step limit.
        image_size: Side of the image [px].
    """

    privileged: ClassVar[Privileged] = Privileged(
        names=("goal_dx", "goal_dy"), scale=(3.0, 3.0), named=2, positions={"goal": (0, 2)}
    )

    task: str | None = "mixed"
    fps: int = 10
    split: str = "train"
    episode_length: int = 40
    image_size: int = 32
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels/top": "observation.images.top",
        }
    )

    def __post_init__(self) -> None:
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
        }

    @property
    def gym_id(self) -> str:
        return "own_env/PointReach-v0"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "image_size": self.image_size,
            "max_episode_steps": self.episode_length,
        }

    def tasks(self) -> list[str]:
        return list(COLORS) if self.task in ("all", "mixed") else [str(self.task)]

    def act(self, env: PointReach) -> Any:
        return np.clip(env.privileged_state() / STEP, -1, 1).astype(np.float32)
