"""Meta-World's tasks as one environment, with fast rendering and access for experts and recording.

Each task is the same simulation, with the same seeds, as in LeRobot's `MetaworldEnv`. Four things
differ: `metaworld.MT1` is not created, because it draws fifty scenes that are not used; images are
rendered in the requested size, smoothed and without shadows; the first image shows the goal of its
own episode, not that of the previous one; a solved episode is not reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import metaworld
import mujoco
import numpy as np
from gymnasium import spaces
from lerobot.envs.metaworld import TASK_POLICY_MAPPING
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.sim.metaworld.tasks import (
    ACTION_NAMES,
    INSTRUCTIONS,
    LARGEST_IMAGE,
    STATE_NAMES,
    TASKS,
)
from ceed_vla.sim.render import check_image_size, coarsen, render, tune

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)  # LeRobot moves the camera to here
# samples per pixel side: a goal in the air is a ball of 3 px, and only its exact size shows its
# distance
SMOOTH = 2
MESH_CELL = 0.004  # [m]
HAND_STEPS = 40  # simulation steps until the hand has reached a place


class MetaworldTasks(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """One environment for all tasks; ``reset(options={"task": name})`` selects one.

    Raises:
        SimulationError: A task is unknown, or the image size cannot be rendered.
    """

    # Gymnasium defines this mutable class attribute.
    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012
    action_names, state_names = ACTION_NAMES, STATE_NAMES

    def __init__(
        self,
        tasks: Sequence[str] = TASKS,
        image_size: int = 96,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.tasks = tuple(tasks)
        for name in self.tasks:
            if name not in INSTRUCTIONS:
                raise SimulationError(
                    f"Unknown task {name!r}; choose some of {', '.join(INSTRUCTIONS)}."
                )
        check_image_size(image_size, LARGEST_IMAGE)
        self.image_size, self.render_mode = image_size, render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": spaces.Box(-1000.0, 1000.0, (len(STATE_NAMES),), np.float64),
            }
        )
        self._made: dict[str, Any] = {}
        self._task = self.tasks[0]
        self._grip = 0.0
        self._success = False
        self._values: NDArray[np.float64] = np.zeros(39)

    # ------------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a scene of the task in `options`, or of a random task; `seed` determines all."""
        super().reset(seed=seed)
        task = (options or {}).get("task") or str(self.np_random.choice(self.tasks))
        if task not in self.tasks:
            raise SimulationError(
                f"Unknown task {str(task)[:80]!r}; choose one of {', '.join(self.tasks)}."
            )
        self._task = task
        self._grip = 0.0
        self._success = False
        world = self._world
        if seed is not None:
            world.seed(seed)
        self._values, _ = world.reset(seed=seed)
        # Meta-World itself moves the drawn goal only with the first step
        mujoco.mj_kinematics(world.model, world.data)
        return self.observe(), {"task": task, "is_success": False}

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        reward = self.advance(action)
        return (
            self.observe(),
            reward,
            self._success,
            False,
            {"task": self._task, "is_success": self._success},
        )

    def advance(self, action: NDArray[np.floating]) -> float:
        """Run one control step without an observation; return its reward."""
        self._grip = float(action[3])
        self._values, reward, _, _, info = self._world.step(np.asarray(action))
        self._success = bool(info.get("success", 0))
        return float(reward)

    def observe(self) -> dict[str, Any]:
        """Return the observation: ``pixels`` (H, W, 3), upright, and ``agent_pos`` (4,)."""
        return {"pixels": self.render(), "agent_pos": self._values[:4].copy()}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        world = self._world
        smooth = min(SMOOTH, LARGEST_IMAGE // self.image_size)
        image = render(self._task, world.model, world.data, CAMERA, self.image_size, smooth)
        return np.ascontiguousarray(np.flip(image, (0, 1)))  # the camera hangs upside down

    def is_success(self) -> bool:
        return self._success

    def close(self) -> None:
        while self._made:
            self._made.popitem()[1].close()

    # ------------------------------------------------------------------ see sim/environment.py

    @property
    def task_description(self) -> str:
        return INSTRUCTIONS[self._task]

    def expert_action(self) -> NDArray[np.float32]:
        """Action (4,) of Meta-World's scripted policy, which reads the goal."""
        action = TASK_POLICY_MAPPING[self._task]().get_action(self._values)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def privileged_state(self) -> NDArray[np.float32]:
        """Object and goal relative to the hand (6,) [m]."""
        world = self._world
        hand = self._values[:3]
        return np.concatenate([self._values[4:7] - hand, world._target_pos - hand]).astype(
            np.float32
        )

    def hold_action(self) -> NDArray[np.float32]:
        return np.array([0.0, 0.0, 0.0, self._grip], dtype=np.float32)

    def scatter(self, rng: np.random.Generator) -> None:
        """Move the hand to a random place in its workspace."""
        world = self._world
        place = rng.uniform(world.mocap_low, world.mocap_high)
        for _ in range(HAND_STEPS):
            world.data.mocap_pos[:] = place
            world.do_simulation([-1.0, 1.0], world.frame_skip)
        self._values = world._get_obs()

    # ------------------------------------------------------------------ simulations

    @property
    def _world(self) -> Any:
        """Meta-World's environment of the current task, created on first use."""
        if self._task not in self._made:
            world: Any = metaworld.env_dict.ALL_V3_ENVIRONMENTS[self._task]()
            # the settings of a task of `metaworld.MT1`
            world._partially_observable = False
            world._set_task_called = True
            world.__dict__.pop("sawyer_observation_space", None)  # cached without the goal
            world.model.cam_pos[
                mujoco.mj_name2id(world.model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
            ] = CAMERA_POSITION
            tune(world.model)
            coarsen(world.model, MESH_CELL)
            world.model.vis.global_.offwidth = world.model.vis.global_.offheight = LARGEST_IMAGE
            world._freeze_rand_vec, world.seeded_rand_vec = False, True
            world.seed(0)
            world.reset()
            self._made[self._task] = world
        return self._made[self._task]
