"""LIBERO's tasks as one environment, with rendering on demand and access for experts and recording.

Simulation, initial states, sampling of the sensors and success are LIBERO's own, bit for bit. Three
things differ from LeRobot's `LiberoEnv`: cameras are rendered on demand; images are turned by 180
degrees already, as LeRobot's processors do afterwards; and the simulation is reset without being
rebuilt, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.sim.libero.cameras import photograph, simplify
from ceed_vla.sim.libero.expert import Expert
from ceed_vla.sim.libero.installation import instruction_of, official_states
from ceed_vla.sim.libero.scene import Scene
from ceed_vla.sim.libero.tasks import (
    ACTION_NAMES,
    CAMERAS,
    CONTROL_RATE,
    RENDERED,
    STATE_NAMES,
    WITH_EXPERT,
    number_of,
    suite_of,
)
from ceed_vla.sim.render import release

# Simulations that a process keeps, by quality of the images: 0.6 GB each with fast ones, 0.9 with
# official ones. Recordings cycle over the tasks; evaluations run several episodes of one in a row.
MOST_SCENES = {"fast": 12, "official": 3}
REACH = np.array([[-0.25, -0.35, 0.08], [0.2, 0.35, 0.38]])  # of `scatter`, from the ground [m]

_kept: list[tuple[LiberoTasks, str]] = []  # every simulation of this process, oldest use first


class LiberoTasks(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """One environment for all tasks; ``reset(options={"task": name})`` selects one.

    Args:
        tasks: Tasks, such as "libero_object/3".
        states: "official": the seed selects one of a task's 50 initial states; as many consecutive
            seeds as there are tasks have the same. "sampled": LIBERO draws a state with the seed.
        image_size: Side of the images [px]; they are rendered with 256 and reduced.
        quality: "official", or "fast": without multisampling, with simplified meshes.
        render_mode: Gymnasium's; no effect.

    Raises:
        SimulationError: LIBERO cannot be imported.
    """

    # Gymnasium defines this mutable class attribute.
    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}  # noqa: RUF012
    action_names, state_names = ACTION_NAMES, STATE_NAMES

    def __init__(
        self,
        tasks: Sequence[str],
        states: str = "official",
        image_size: int = RENDERED,
        quality: str = "official",
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.tasks = tuple(tasks)
        self.states = states
        self.image_size = image_size
        self.quality = quality
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, image)),
                "agent_pos": spaces.Box(-10.0, 10.0, (len(STATE_NAMES),), np.float32),
            }
        )
        self._scenes: dict[str, Scene] = {}
        self._task = self.tasks[0]
        self._gripper = -1.0
        self._success = False

    # ------------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the task in `options`, or a random task; `seed` determines all."""
        super().reset(seed=seed)
        task = (options or {}).get("task") or str(self.np_random.choice(self.tasks))
        if task not in self.tasks:
            raise SimulationError(
                f"Unknown task {str(task)[:80]!r}; choose one of {', '.join(self.tasks)}."
            )
        self._task = task
        self._gripper = -1.0
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        if self.states == "official":
            states = official_states(suite_of(task), number_of(task))
            self.scene.start(states[number // len(self.tasks) % len(states)], number)
        else:
            self.scene.draw(number)
        self._success = self.scene.solved()
        return self.observe(), {"task": task, "is_success": self._success}

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        reward = self.advance(action)
        info = {"task": self._task, "is_success": self._success}
        return self.observe(), reward, self._success, False, info

    def advance(self, action: NDArray[np.floating]) -> float:
        """Run one control step without an observation; return its reward."""
        action = np.asarray(action)
        self._gripper = float(action[6])
        self._success = self.scene.step(action)
        return float(self._success)

    def observe(self) -> dict[str, Any]:
        """Return the observation: ``pixels`` {camera: (H, W, 3)} and ``agent_pos`` (8,)."""
        pixels = {camera: self._image(camera) for camera in CAMERAS}
        return {"pixels": pixels, "agent_pos": agent_state(self.scene.observation)}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        return self._image(next(iter(CAMERAS)))

    def is_success(self) -> bool:
        return self._success

    def close(self) -> None:
        for task in list(self._scenes):
            self._drop(task)

    # ------------------------------------------------------------------ see sim/environment.py

    @property
    def task_description(self) -> str:
        return instruction_of(suite_of(self._task), number_of(self._task))

    def expert_action(self) -> NDArray[np.float32]:
        """Action (7,) of the scripted expert.

        Raises:
            SimulationError: It has none for the suite.
        """
        self._needs_expert()
        return Expert(self.scene).action()

    def privileged_state(self) -> NDArray[np.float32]:
        """Object and target relative to the hand (6,) [m]; errors as of `expert_action`."""
        self._needs_expert()
        scene = self.scene
        places = [np.mean(scene.box(name), axis=0) for name in scene.world.obj_of_interest[:2]]
        return np.concatenate([place - scene.hand for place in places]).astype(np.float32)

    def hold_action(self) -> NDArray[np.float32]:
        return np.array([0, 0, 0, 0, 0, 0, self._gripper], dtype=np.float32)

    def disturbance(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """A random motion with little rotation, and now and then of the fingers."""
        gripper = -self._gripper if rng.random() < 0.1 else self._gripper
        turn = rng.uniform(-0.2, 0.2, 3)
        return np.array([*rng.uniform(-1, 1, 3), *turn, gripper], dtype=np.float32)

    def scatter(self, rng: np.random.Generator) -> None:
        """Put the hand at a random place above the ground or table, upright."""
        self.scene.put_hand(rng.uniform(*REACH) + self.scene.ground)

    def _needs_expert(self) -> None:
        suite = suite_of(self._task)
        if suite not in WITH_EXPERT:
            raise SimulationError(
                f"{suite} has no scripted expert, which recording needs; choose "
                f"{' or '.join(WITH_EXPERT)} for --env.task."
            )

    # ------------------------------------------------------------------ simulations

    @property
    def scene(self) -> Scene:
        """The simulation of the current task, built on first use."""
        mine = (self, self._task)
        if self._task in self._scenes:
            _kept.remove(mine)
        else:
            for owner, oldest in [one for one in _kept if one[1] != one[0]._task]:
                if len(_kept) >= MOST_SCENES[self.quality]:
                    owner._drop(oldest)
            scene = Scene(suite_of(self._task), number_of(self._task))
            if self.quality == "fast":
                simplify(scene.model)
            self._scenes[self._task] = scene
        _kept.append(mine)
        return self._scenes[self._task]

    def _drop(self, task: str) -> None:
        _kept.remove((self, task))
        self._scenes.pop(task).close()
        if not any(other == task and env.quality == self.quality for env, other in _kept):
            release(f"{task} {self.quality}")

    def _image(self, camera: str) -> NDArray[np.uint8]:
        scene = self.scene
        with scene.lights_as_sampled():
            return photograph(
                f"{self._task} {self.quality}",
                scene.model,
                scene.sampled,
                CAMERAS[camera],
                self.image_size,
                effects=self.quality == "official",
            )


def agent_state(observation: dict[str, Any]) -> NDArray[np.float32]:
    """Return the state (8,) that policies receive: position of the hand [m], its rotation as axis
    times angle [rad], and the two finger joints [m].

    The angle is between 0 and 2 pi, as in LeRobot: the hand points down, where an angle limited to
    pi would change its sign again and again.
    """
    quaternion = np.asarray(observation["robot0_eef_quat"], dtype=np.float64)  # (x, y, z, w)
    sine = np.sqrt(max(1.0 - quaternion[3] ** 2, 0.0))
    angle = 2.0 * np.arccos(np.clip(quaternion[3], -1.0, 1.0))
    rotation = quaternion[:3] * angle / sine if sine > 1e-10 else np.zeros(3)
    parts = (observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"])
    return np.concatenate(parts).astype(np.float32)
