"""The tabletop scene as a position-controlled robot whose time advances with or without commands.
Free of ROS.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ceed_vla.errors import SimulationError
from ceed_vla.kinematics import matrix_rpy
from ceed_vla.ros_nodes.simulated.controllers import (
    Array,
    Controller,
    ForwardPosition,
    ServoTwist,
    Trajectory,
    finite,
)
from ceed_vla.sim.tabletop import arm, expert
from ceed_vla.sim.tabletop.env import TabletopEnv
from ceed_vla.sim.tabletop.scene import CAMERAS, FINGER_STROKE, SIM_DT

ARM_JOINTS = tuple(f"joint{index + 1}" for index in range(len(arm.HOME)))
JOINTS = (*ARM_JOINTS, "finger_left", "finger_right")


class SimRobot:
    """Arm, gripper, cameras and scene.

    The last command applies, through any interface; `SimulationError`: A command is refused. When
    positions or twists stop for `command_timeout` [s], the arm stops where it is, and the gripper's
    last command still applies. `split` and `image_size` [px] are as in `TabletopEnv`.
    """

    def __init__(
        self, split: str = "train", image_size: int = 96, command_timeout: float = 0.05
    ) -> None:
        if not command_timeout > 0.0:
            raise SimulationError(
                f"command_timeout is {command_timeout} s; it must be more than 0."
            )
        self.command_timeout = command_timeout
        self.time = 0.0  # simulated time since construction [s]; a reset does not change it
        self.holds = 0  # number of times that the arm stopped because commands stopped
        self._env = TabletopEnv(split=split, image_size=image_size, cameras=())
        self._arm = arm.SceneArm(self._env.scene.model, self._env.scene.tcp_site)
        self._controller: Controller | None = None
        self._owed = 0.0  # time that is too short for a physics step so far [s]
        self._joints: Array = arm.HOME.copy()  # set-point

    def reset(self, seed: int, task: str = "mixed") -> str:
        """Draw a scene, put the arm at rest in its start pose, and drop earlier commands.

        The `seed` determines everything; `task` is a family, or "mixed" to draw one. Returns the
        instruction.
        """
        self._env.reset(seed=seed, options={"task": task})
        self._controller, self._owed = None, 0.0
        self._joints = self._env.data.ctrl[: len(ARM_JOINTS)].copy()
        return self.instruction

    @property
    def instruction(self) -> str:
        return self._env.instruction

    @property
    def family(self) -> str:
        return self._env.family

    @property
    def success(self) -> bool:
        """Whether the instruction is fulfilled now."""
        mujoco.mj_forward(self._env.scene.model, self._env.data)
        return self._env.is_success()

    def expert_action(self) -> Array:
        """Action (7,) in [-1, 1] of the scripted expert, which knows the scene: it leads on from
        the present set-point.
        """
        mujoco.mj_forward(self._env.scene.model, self._env.data)
        position, matrix = self._arm.pose(self._joints)
        now = replace(
            self._env.situation(), command_position=position, command_rpy=matrix_rpy(matrix)
        )
        return expert.expert_action(self._env.command, now).astype(np.float64)

    @property
    def positions(self) -> Array:
        """Measured positions (9,) of `JOINTS` [rad], fingers [m]."""
        return self._env.data.qpos[: len(JOINTS)].copy()

    @property
    def velocities(self) -> Array:
        """Measured velocities (9,) of `JOINTS` [rad/s], fingers [m/s]."""
        return self._env.data.qvel[: len(JOINTS)].copy()

    @property
    def efforts(self) -> Array:
        """Actuator efforts (9,) of `JOINTS` [N m], fingers [N]."""
        return self._env.data.qfrc_actuator[: len(JOINTS)].copy()

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """Return an image (S, S, 3) of every camera, all of the present moment."""
        # poses of the state after the last physics step
        mujoco.mj_forward(self._env.scene.model, self._env.data)
        return {name: self._env.view(name, self._env.image_size) for name in CAMERAS}

    def command_positions(self, positions: ArrayLike) -> None:
        """Command joint positions (7,) [rad], effective at once."""
        wanted = finite("joint positions", positions, (len(ARM_JOINTS),))
        self._controller = ForwardPosition(_inside(wanted), self.time + self.command_timeout)

    def command_trajectory(
        self,
        names: list[str],
        times: ArrayLike,
        positions: ArrayLike,
        velocities: ArrayLike | None = None,
        delay: float = 0.0,
    ) -> None:
        """Follow way-points of the seven arm joints; without way-points, the arm stops.

        Args:
            names: The joints, in any order.
            times: Times (P,) of the way-points after the start [s].
            positions: Way-points (P, 7) [rad].
            velocities: Velocities (P, 7) at the way-points [rad/s]; None interpolates linearly.
            delay: Time until the start [s]; negative if the start is past.
        """
        if np.size(times) == 0:
            self.hold()
            return
        if sorted(names) != sorted(ARM_JOINTS):
            raise SimulationError(
                f"The trajectory names joints {names}; give all of {', '.join(ARM_JOINTS)}, once."
            )
        order = [names.index(name) for name in ARM_JOINTS]
        columns = (len(np.asarray(times)), len(ARM_JOINTS))
        points = finite("way-points", positions, columns)[:, order]
        slopes = (
            None
            if velocities is None
            else finite("way-point velocities", velocities, columns)[:, order]
        )
        running = self._controller
        speed = (
            running.sample(self.time)[1]
            if isinstance(running, Trajectory)
            else np.zeros(len(ARM_JOINTS))
        )
        self._controller = Trajectory(
            self.time + delay, self.time, self._joints, speed, times, _inside(points), slopes
        )

    def command_twist(self, linear: ArrayLike, angular: ArrayLike) -> None:
        """Move the TCP with a twist in the base frame, (3,) [m/s] and (3,) [rad/s]."""
        linear = finite("linear velocity", linear, (3,))
        angular = finite("angular velocity", angular, (3,))
        if not isinstance(self._controller, ServoTwist):
            self._controller = ServoTwist(self._arm, self.time, self._joints)
        self._controller.command(linear, angular, self.time + self.command_timeout)

    def command_gripper(self, opening: ArrayLike) -> None:
        """Open the fingers to a distance (1,) [m]."""
        (wanted,) = finite("gripper opening", opening, (1,))
        each = float(np.clip(0.5 * wanted, 0.0, FINGER_STROKE))
        self._env.data.ctrl[len(ARM_JOINTS) : len(JOINTS)] = each
        self._env.gripper_open = each > 0.5 * FINGER_STROKE

    def move_target(self, shift: ArrayLike) -> None:
        """Move the instruction's cube on the table by (2,) [m], instantly."""
        address = self._env.scene.cube_qpos[self._env.command.target]
        self._env.data.qpos[address : address + 2] += finite("shift", shift, (2,))

    def hold(self) -> None:
        """Stop the arm where it is."""
        self._controller = None
        self._joints = _inside(self.positions[: len(ARM_JOINTS)])

    def advance(self, duration: float) -> None:
        """Advance by `duration` [s] in steps of `SIM_DT`; the rest adds to the next call."""
        env = self._env
        self._owed += max(duration, 0.0)
        steps = int(self._owed / SIM_DT + 1e-9)
        self._owed -= steps * SIM_DT
        for _ in range(steps):
            wanted = (
                self._joints if self._controller is None else self._controller.setpoint(self.time)
            )
            if wanted is None:
                self.hold()
                self.holds += 1
            else:
                self._joints = wanted
            env.data.ctrl[: len(ARM_JOINTS)] = self._joints
            mujoco.mj_step(env.scene.model, env.data)
            self.time += SIM_DT

    def close(self) -> None:
        self._env.close()


def _inside(positions: Any) -> Array:
    """Clip joint positions (..., 7) to the arm's limits [rad]."""
    return np.clip(positions, arm.JOINT_LOW, arm.JOINT_HIGH)
