"""The Gymnasium environment of the tabletop, with privileged access for recording and experts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.kinematics import CommandedPose, PoseLimits, rpy_matrix
from ceed_vla.sim.render import check_image_size, render
from ceed_vla.sim.tabletop import arm, expert, layout, tasks
from ceed_vla.sim.tabletop.scene import CAMERAS, FINGER_STROKE, SIM_DT, load_scene

CTRL_DT = 0.1  # [s]
POSITION_STEP = 0.05  # TCP motion of a full action [m]
ROTATION_STEP = 0.25  # TCP rotation of a full action [rad]
WORKSPACE_LOW = np.array([0.28, -0.32, 0.015])  # commanded TCP [m]
WORKSPACE_HIGH = np.array([0.72, 0.32, 0.40])
MAX_TILT, MAX_YAW = 0.4, 1.75  # commanded roll and pitch, yaw [rad]
HOME_POSITION = np.array([0.40, 0.0, 0.27])  # [m]
HOME_SPREAD = np.array([0.03, 0.06, 0.03])  # [m]
HOME_YAW_SPREAD = 0.15  # [rad]
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = (
    *("tcp_x", "tcp_y", "tcp_z", "tcp_qw", "tcp_qx", "tcp_qy", "tcp_qz", "finger_opening"),
    *(
        "command_x",
        "command_y",
        "command_z",
        "command_cos_yaw",
        "command_sin_yaw",
        "command_gripper",
    ),
)

_SUBSTEPS = round(CTRL_DT / SIM_DT)
_RAMP = 5  # the joint targets move in this many parts during a control step
_SETTLE_SUBSTEPS = 20  # before the first image
_TELEPORT_SOLVES = 8  # the first is nearly always enough; the others then cost nothing
_JOINT_STEP = 0.6  # largest change of a joint target per control step [rad]
_POSE_LIMITS = PoseLimits(
    POSITION_STEP, ROTATION_STEP, WORKSPACE_LOW, WORKSPACE_HIGH, MAX_TILT, MAX_YAW
)
# x and z of absent cubes, on the floor behind the front camera [m]
_PARKED = (3.0, tasks.CUBE_HALF - 0.4)


class TabletopEnv(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """Language-conditioned manipulation of coloured cubes with a 7-joint arm at 10 Hz.

    Action (7,) in [-1, 1]: TCP translation xyz (times 0.05 m), TCP rotation vector (times 0.25
    rad), both in the base frame and added to the *commanded* pose, and the gripper (> 0 open, else
    close). Observation: ``pixels`` (one uint8 image (S, S, 3) per camera; absent without cameras)
    and ``agent_pos`` (14,), whose parts are `STATE_NAMES` in metres. `SimulationError` for an
    unknown task, split, camera or size.

    Args:
        task: A family of `tasks.TASKS`, or "mixed" to draw one at every reset.
        families: Families from which `retarget` draws if `task` is "mixed".
        split: Combinations of colours and phrasings to draw: "train", "heldout" or "all".
        image_size: Side of the square camera images [px].
        cameras: Cameras of the observation; empty for physics only.
        render_mode: "rgb_array" or None.
        render_size: Side of the image that `render` returns [px].
    """

    # Gymnasium defines this mutable class attribute.
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    action_names, state_names = ACTION_NAMES, STATE_NAMES

    def __init__(
        self,
        task: str = "mixed",
        families: Sequence[str] = tasks.TASKS,
        split: str = "train",
        image_size: int = 96,
        cameras: Sequence[str] = CAMERAS,
        render_mode: str | None = "rgb_array",
        render_size: int = 256,
    ) -> None:
        tasks.check_choice("task", task, (*tasks.TASKS, "mixed"))
        tasks.check_choice("split", split, tasks.SPLITS)
        for camera in cameras:
            tasks.check_choice("camera", camera, CAMERAS)
        for size in (image_size, render_size):
            check_image_size(size, tasks.MAX_IMAGE_SIZE)
        if render_mode not in (None, "rgb_array"):
            raise SimulationError(f'Unknown render_mode {render_mode!r}; use "rgb_array" or None.')
        self.task, self.families, self.split = task, tuple(families), split
        self.image_size, self.render_size = image_size, render_size
        self.cameras = tuple(cameras)
        self.render_mode = render_mode
        self.scene = load_scene()
        self.data = mujoco.MjData(self.scene.model)
        self._arm = arm.SceneArm(self.scene.model, self.scene.tcp_site)
        self._command: tasks.Command | None = None
        self._present: NDArray[np.bool_] = np.zeros(len(tasks.COLORS), dtype=bool)
        self._pose = CommandedPose(_POSE_LIMITS, HOME_POSITION.copy())
        self.gripper_open = True
        self._joints: arm.Array = arm.HOME.copy()
        self.action_space = spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)
        self.observation_space = spaces.Dict(
            {"agent_pos": spaces.Box(-2.0, 2.0, (len(STATE_NAMES),), np.float32)}
        )
        if cameras:
            shape = (image_size, image_size, 3)
            pixels = spaces.Dict({name: spaces.Box(0, 255, shape, np.uint8) for name in cameras})
            self.observation_space["pixels"] = pixels

    # ------------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a scene and an instruction; `seed` determines everything.

        `options` may fix "task", "color", "other" (second colour or side) and "phrase" (index).
        `SimulationError` for a negative seed or unknown options, or when the split has no such
        combination.
        """
        if seed is not None and seed < 0:
            raise SimulationError(f"seed is {seed}; it must be at least 0.")
        super().reset(seed=seed)
        rng = self.np_random
        self._command = layout.draw_command(rng, self.task, self.split, tasks.COLORS, options or {})
        self._place(layout.draw_layout(rng, self._command))
        position = HOME_POSITION + rng.uniform(-1.0, 1.0, 3) * HOME_SPREAD
        self._teleport(position, rng.uniform(-HOME_YAW_SPREAD, HOME_YAW_SPREAD), open_gripper=True)
        mujoco.mj_step(self.scene.model, self.data, nstep=_SETTLE_SUBSTEPS)
        mujoco.mj_forward(self.scene.model, self.data)
        return self.observe(), self._info()

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advance by 0.1 s; success, with reward 1, ends the episode. `SimulationError` for NaN or
        another shape.
        """
        self.advance(action)
        info = self._info()
        success: bool = info["is_success"]
        return self.observe(), float(success), success, False, info

    def view(self, camera: str, size: int) -> NDArray[np.uint8]:
        """Image (size, size, 3) of the present state."""
        return render("tabletop", self.scene.model, self.data, camera, size)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """Front view (render_size, render_size, 3), or None without a render mode."""
        return None if self.render_mode is None else self.view("front", self.render_size)

    # ------------------------------------------------------------------ for recording and experts

    @property
    def command(self) -> tasks.Command:
        """The command of the episode; `SimulationError` before the first reset."""
        if self._command is None:
            raise SimulationError("The environment has no scene yet; call reset() first.")
        return self._command

    @property
    def family(self) -> str:
        return self.command.family

    @property
    def instruction(self) -> str:
        return self.command.text

    task_description = instruction  # the name that LeRobot reads

    @property
    def colors(self) -> tuple[str, ...]:
        """Colours of the cubes on the table."""
        return tuple(color for color, here in zip(tasks.COLORS, self._present, strict=True) if here)

    def advance(self, action: NDArray[np.floating]) -> None:
        """One control step without rendering or observation; see `step`."""
        action = self._checked(action)
        self.command  # noqa: B018 - raises before the first reset
        self._pose.advance(action[:6])
        self.gripper_open = bool(action[6] > 0.0)
        start = self._joints
        wanted = self._arm.solve(start, self._pose.position, self._pose.matrix)
        self._joints = start + np.clip(wanted - start, -_JOINT_STEP, _JOINT_STEP)
        self._pose.follow(*self._arm.pose(self._joints))
        self.data.ctrl[7:9] = FINGER_STROKE if self.gripper_open else 0.0
        for part in range(1, _RAMP + 1):
            self.data.ctrl[:7] = start + (self._joints - start) * (part / _RAMP)
            mujoco.mj_step(self.scene.model, self.data, nstep=_SUBSTEPS // _RAMP)
        mujoco.mj_forward(self.scene.model, self.data)  # poses of the state after the last substep

    def hold_action(self) -> NDArray[np.float32]:
        """The action (7,) that leaves the commanded pose and the gripper unchanged."""
        return np.array([0, 0, 0, 0, 0, 0, 1 if self.gripper_open else -1], dtype=np.float32)

    def observe(self) -> dict[str, Any]:
        """The observation of the current state (renders the cameras)."""
        observation: dict[str, Any] = {}
        if self.cameras:
            observation["pixels"] = {
                name: self.view(name, self.image_size) for name in self.cameras
            }
        observation["agent_pos"] = self._agent_pos()
        return observation

    def snapshot(self) -> dict[str, Any]:
        """Return the complete state, for `restore` here or in an environment of equal settings."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.scene.model, kind))
        mujoco.mj_getState(self.scene.model, self.data, state, kind)
        own = (self._command, self._present, self._pose, self.gripper_open, self._joints)
        return {
            "physics": state,
            "own": deepcopy(own),
            "random": self.np_random.bit_generator.state,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Restore a `snapshot`: equal actions then give equal observations, byte for byte."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        own = deepcopy(snapshot["own"])
        self._command, self._present, self._pose, self.gripper_open, self._joints = own
        self.np_random.bit_generator.state = snapshot["random"]
        mujoco.mj_setState(self.scene.model, self.data, snapshot["physics"], kind)
        mujoco.mj_forward(self.scene.model, self.data)  # poses; also changes the solver's start
        mujoco.mj_setState(self.scene.model, self.data, snapshot["physics"], kind)

    def situation(self) -> tasks.Situation:
        """The part of the simulator state that success tests and experts need."""
        data, scene = self.data, self.scene
        bodies = list(scene.cube_bodies)
        here = self._present.astype(np.float64)
        speeds = [
            float(np.linalg.norm(data.qvel[address : address + 3])) for address in scene.cube_qvel
        ]
        tcp_matrix = data.site_xmat[scene.tcp_site].reshape(3, 3)
        return tasks.Situation(
            cubes=data.xpos[bodies] * here[:, None],
            cube_yaws=np.array([_cube_yaw(m.reshape(3, 3)) for m in data.xmat[bodies]]) * here,
            cube_speeds=np.array(speeds) * here,
            bin=data.mocap_pos[scene.bin_mocap].copy(),
            plate=data.mocap_pos[scene.plate_mocap].copy(),
            tcp=data.site_xpos[scene.tcp_site].copy(),
            tcp_yaw=float(np.arctan2(tcp_matrix[1, 0], tcp_matrix[0, 0])),
            opening=float(data.qpos[7] + data.qpos[8]),
            command_position=self._pose.position.copy(),
            command_rpy=self._pose.rpy.copy(),
            gripper_open=self.gripper_open,
        )

    def privileged_state(self) -> NDArray[np.float32]:
        """Simulator state that the policy does not receive: (E,) float32 [m, rad].

        `ceed_vla.sim.tabletop.lerobot_env` names its values.
        """
        now = self.situation()
        target = self.command.target
        angle = 4.0 * (now.cube_yaws[target] - now.tcp_yaw)
        cubes = np.column_stack([now.cubes, now.cube_yaws])
        fixed = np.array([[*now.bin, 0.0], [*now.plate, 0.0]])
        goal = tasks.goal_position(self.command, now)
        near = (now.cubes[target] - now.tcp, [np.cos(angle), np.sin(angle)], goal - now.tcp)
        return np.concatenate([*near, cubes.ravel(), fixed.ravel()]).astype(np.float32)

    def is_success(self) -> bool:
        return tasks.is_success(self.command, self.situation())

    def expert_action(self) -> NDArray[np.float32]:
        """Action of the scripted expert (7,); see `ceed_vla.sim.tabletop.expert`."""
        return expert.expert_action(self.command, self.situation())

    def disturbance(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Random action (7,): any translation, moderate rotation, sometimes a flipped gripper."""
        flip = -1.0 if rng.random() < 0.1 else 1.0
        gripper = 1.0 if self.gripper_open else -1.0
        parts = rng.uniform(-1, 1, 3), rng.uniform(-0.3, 0.3, 3), [gripper * flip]
        return np.concatenate(parts).astype(np.float32)

    def scatter(self, rng: np.random.Generator) -> None:
        """Teleport the arm to a random plausible pose above the objects, gripper open or closed."""
        position = rng.uniform([0.32, -0.26, 0.03], [0.70, 0.26, 0.34])
        now = self.situation()
        things = np.vstack([now.cubes[self._present], now.bin, now.plate])
        clearance = np.array([0.11] * int(self._present.sum()) + [0.15, 0.15])
        if np.any(np.linalg.norm(things[:, :2] - position[:2], axis=1) < clearance):
            position[2] = max(position[2], rng.uniform(0.075, 0.20))
        self._teleport(position, rng.uniform(-0.6, 0.6), open_gripper=bool(rng.random() < 0.7))
        # In motion the command leads the arm: a policy must not confuse the two.
        lead = rng.normal(0.0, 0.01, 3)
        self._pose.position = np.clip(self._pose.position + lead, WORKSPACE_LOW, WORKSPACE_HIGH)

    def retarget(self, rng: np.random.Generator) -> None:
        """Draw another instruction for the same scene, with the same split and `task`."""
        family = str(rng.choice(self.families)) if self.task == "mixed" else self.task
        self._command = layout.draw_command(rng, family, self.split, self.colors, {})

    # ------------------------------------------------------------------ internals

    def _checked(self, action: NDArray[np.floating]) -> NDArray[np.float64]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (len(ACTION_NAMES),):
            raise SimulationError(
                f"Action of shape {action.shape}; give ({len(ACTION_NAMES)},): {ACTION_NAMES}."
            )
        if not np.isfinite(action).all():
            raise SimulationError(
                f"Action {action.tolist()} is not finite; every value must be in [-1, 1]."
            )
        return np.clip(action, -1.0, 1.0)

    def _place(self, scene_layout: layout.Layout) -> None:
        """Put every object at its place in the layout, at rest."""
        data, scene = self.data, self.scene
        mujoco.mj_resetData(scene.model, data)
        self._present = np.array(scene_layout.present)
        for index, address in enumerate(scene.cube_qpos):
            half_yaw = 0.5 * scene_layout.yaws[index]
            position: Any = _PARKED[0], 0.2 * index, _PARKED[1]
            if self._present[index]:
                position = *scene_layout.cubes[index], tasks.CUBE_HALF
            data.qpos[address : address + 7] = [
                *position,
                np.cos(half_yaw),
                0.0,
                0.0,
                np.sin(half_yaw),
            ]
        data.mocap_pos[scene.bin_mocap] = [*scene_layout.bin, 0.0]
        data.mocap_pos[scene.plate_mocap] = [*scene_layout.plate, 0.0]

    def _teleport(self, position: NDArray[np.float64], yaw: float, open_gripper: bool) -> None:
        """Put the arm at rest in a pose and command it to stay there."""
        rpy = np.array([0.0, 0.0, yaw])
        self._joints = arm.HOME
        for _ in range(_TELEPORT_SOLVES):
            self._joints = self._arm.solve(self._joints, position, rpy_matrix(rpy))
        self.gripper_open = open_gripper
        finger = FINGER_STROKE if open_gripper else 0.0
        self.data.qpos[:9] = self.data.ctrl[:9] = [*self._joints, finger, finger]
        self.data.qvel[:9] = 0.0
        mujoco.mj_forward(self.scene.model, self.data)
        self._pose.position = np.array(position)
        self._pose.rpy = rpy
        self._pose.follow(*self._arm.pose(self._joints))

    def _agent_pos(self) -> NDArray[np.float32]:
        data, site = self.data, self.scene.tcp_site
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, data.site_xmat[site])
        quat *= np.copysign(1.0, quat[0])
        yaw = self._pose.rpy[2]
        opening = data.qpos[7] + data.qpos[8]
        gripper = 1.0 if self.gripper_open else -1.0
        parts = (
            data.site_xpos[site],
            quat,
            [opening],
            self._pose.position,
            [np.cos(yaw), np.sin(yaw), gripper],
        )
        return np.concatenate(parts).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {
            "is_success": self.is_success(),
            "task": self.family,
            "instruction": self.instruction,
        }


def _cube_yaw(matrix: NDArray[np.float64]) -> float:
    """Yaw of a cube modulo a quarter turn, in [-pi/4, pi/4) [rad], whichever face it lies on."""
    up = int(np.argmax(np.abs(matrix[2])))
    axis = matrix[:, (up + 1) % 3]
    quarter = np.pi / 2
    return float((np.arctan2(axis[1], axis[0]) + quarter / 2) % quarter - quarter / 2)
