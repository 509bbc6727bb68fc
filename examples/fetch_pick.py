"""gymnasium-robotics' FetchPickAndPlace with cameras: bring a block to a red mark.

The observation has two cameras, which move with the hand as wrist cameras do, and the position of
the gripper. The positions of block and mark are visible in the images only. Importing this module
registers ``--env.type=fetch_pick``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from ceed_vla.sim.environment import Privileged

VIEWS = {"front": (180.0, -40.0), "side": (90.0, -15.0)}  # azimuth and elevation [deg]
DISTANCE = 0.85  # of the cameras from the gripper [m]
SPEED = 0.05  # of a full action [m per control step]
OPEN, CLOSED = 1.0, -1.0
HELD = 0.06  # distance of the fingers when the block, 5 cm wide, is held [m]
GAIN = 0.4  # share of the remaining distance that the expert moves in a step
ABOVE = 0.06  # height over the block at which the gripper starts to descend [m]
INSTRUCTION = "bring the block to the red mark"


class FetchPick(gymnasium.Env):
    """Action (4,) in [-1, 1]: a step of the gripper along x, y, z, and the fingers (open > 0)."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 25}
    action_names = ("dx", "dy", "dz", "gripper")
    state_names = ("x", "y", "z", "left_finger", "right_finger", "vx", "vy", "vz")
    task_description = INSTRUCTION

    def __init__(self, image_size: int = 96, render_mode: str = "rgb_array") -> None:
        self.size, self.render_mode = image_size, render_mode
        self.fetch = MujocoFetchPickAndPlaceEnv()
        model = self.fetch.model
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0  # renders ten times as fast
        model.light_castshadow[:] = model.mat_reflectance[:] = 0
        self.renderer = mujoco.Renderer(model, image_size, image_size)
        self.action_space = self.fetch.action_space
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(VIEWS, image)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (len(self.state_names),), np.float32),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.seen, _ = self.fetch.reset(seed=seed)
        return self.observe(), {"is_success": self.is_success()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.advance(action)
        solved = self.is_success()
        return self.observe(), float(solved), solved, False, {"is_success": solved}

    def render(self, view: str = "front") -> Any:
        camera = mujoco.MjvCamera()
        camera.lookat[:] = self.seen["observation"][:3] + [0, 0, 0.08]
        camera.distance = DISTANCE
        camera.azimuth, camera.elevation = VIEWS[view]
        self.fetch._render_callback()  # puts the red mark where the goal is
        self.renderer.update_scene(self.fetch.data, camera)
        return self.renderer.render().copy()

    def close(self) -> None:
        self.renderer.close()
        self.fetch.close()

    # ---- methods for `record`, `train` and `eval` besides gymnasium's; see sim/environment.py ----

    def observe(self) -> dict[str, Any]:
        fetch = self.seen["observation"]
        state = np.concatenate([fetch[:3], fetch[9:11], 25 * fetch[20:23]]).astype(np.float32)
        return {"pixels": {view: self.render(view) for view in VIEWS}, "agent_pos": state}

    def advance(self, action: Any) -> None:
        self.seen = self.fetch.step(np.clip(action, -1, 1).astype(np.float32))[0]

    def is_success(self) -> bool:
        distance = np.linalg.norm(self.seen["achieved_goal"] - self.seen["desired_goal"])
        return bool(distance < self.fetch.distance_threshold)

    def privileged_state(self) -> Any:
        """Block and mark relative to the gripper [m]: an auxiliary target, never an input."""
        gripper = self.seen["observation"][:3]
        places = (self.seen["achieved_goal"] - gripper, self.seen["desired_goal"] - gripper)
        return np.concatenate(places).astype(np.float32)

    def scatter(self, rng: np.random.Generator) -> None:
        """Move the hand to a random place, then run a part of the expert's motion."""
        goal = rng.uniform((1.15, 0.55, 0.43), (1.5, 0.95, 0.75))
        for _ in range(6):
            step = (goal - self.seen["observation"][:3]) / SPEED
            self.advance(np.append(np.clip(step, -1, 1), rng.choice([OPEN, CLOSED])))
        for _ in range(rng.integers(0, 20)):
            self.advance(self.expert_action() + np.append(rng.normal(0, 0.2, 3), 0))

    def retarget(self, rng: np.random.Generator) -> None:
        """Move the mark."""
        self.fetch.goal = self.fetch._sample_goal()
        self.seen = self.fetch._get_obs()

    def disturbance(self, rng: np.random.Generator) -> Any:
        return np.append(rng.uniform(-1, 1, 3), rng.choice([OPEN, CLOSED])).astype(np.float32)

    def expert_action(self) -> Any:
        """Descend through a funnel over the block, close the gripper, move to the mark.

        The action depends only on the state, and changes little with small changes of it. So a
        policy that localises the block with an error of a few millimetres can still imitate it.
        """
        block, mark = np.split(self.privileged_state().astype(np.float64), 2)
        fingers = self.seen["observation"][9:11].sum()  # distance of the fingers [m]
        away = np.linalg.norm(block[:2])
        if away < 0.025 and abs(block[2]) < 0.015:  # the block is between the fingers
            move = mark - block if fingers < HELD else block
            gripper = CLOSED
        else:
            height = ABOVE * np.clip((away - 0.01) / 0.05, 0, 1)
            move = block + [0, 0, height]
            gripper = OPEN
        return np.append(np.clip(GAIN * move / SPEED, -1, 1), gripper).astype(np.float32)


gymnasium.register("fetch_pick/FetchPick-v0", FetchPick)


@EnvConfig.register_subclass("fetch_pick")
@dataclass
class FetchPickConfig(EnvConfig):
    """FetchPickAndPlace with cameras.

    Attributes:
        episode_length: Step limit.
        image_size: Side of the images [px].
    """

    privileged: ClassVar[Privileged] = Privileged(
        names=("block_x", "block_y", "block_z", "mark_x", "mark_y", "mark_z"),
        scale=(20.0,) * 6,
        positions={"block": (0, 3), "mark": (3, 6)},
    )

    task: str | None = "fetch_pick"
    fps: int = 25
    episode_length: int = 50
    image_size: int = 96
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        side = self.image_size
        states = len(FetchPick.state_names)
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (states,)),
        }
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for view in VIEWS:
            self.features[f"pixels/{view}"] = PolicyFeature(FeatureType.VISUAL, (side, side, 3))
            self.features_map[f"pixels/{view}"] = f"observation.images.{view}"

    @property
    def gym_id(self) -> str:
        return "fetch_pick/FetchPick-v0"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "max_episode_steps": self.episode_length}

    def act(self, env: FetchPick) -> Any:
        return env.expert_action()
