"""From a policy's actions to the arm's joint targets and the gripper's opening, one step of the policy at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import ArmKinematics, Array, CommandedPose, PoseLimits
from ros_nodes.robot.robot_config import Gripper, RobotConfig


class Motion:
    """Where the arm shall be at the end of the step that runs. Subclasses say what an action does.

    Attributes:
        joints: (J,) targets [rad].
        gripper: Opening [m]; None while no action has set it.
    """

    def __init__(self, robot: RobotConfig) -> None:
        self._robot = robot
        self.joints: Array = np.zeros(len(robot.arm.joints))
        self.gripper: float | None = None
        self._open = True

    def restart(self, joints: Array, opening: float | None) -> None:
        """Start from joints (J,) [rad] and a gripper's opening [m] as measured; nothing is commanded yet."""
        self.gripper = None
        if self._robot.gripper is not None and opening is not None:
            self._open = opening > 0.5 * (self._robot.gripper.closed + self._robot.gripper.open)
        self.resume(joints)

    def resume(self, joints: Array) -> None:
        """Go on from joints (J,) [rad], where the arm was held; the gripper's command stays."""
        self.joints = np.array(joints, dtype=np.float64)

    def save(self) -> tuple[Any, ...]:
        """Where everything is now, for `restore`."""
        return self.joints, self.gripper, self._open

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Undo what was done since `save`."""
        self.joints, self.gripper, self._open = saved

    def advance(self, action: Array) -> None:
        """Execute one action (A,).

        Raises:
            ConfigError: Another length, or not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self._robot.action_dim,) or not np.isfinite(action).all():
            raise ConfigError(f"The action is {action.tolist()}; give {self._robot.action_dim} finite numbers.")
        gripper = self._robot.gripper
        if gripper is not None and gripper.action != "none":
            self._command_gripper(gripper, float(action[-1]))
            action = action[:-1]
        self._move(action)

    @property
    def commanded(self) -> dict[str, Array | float | None]:
        """The commanded parts of a policy's state."""
        return {"commanded_gripper": 1.0 if self._open else -1.0}

    def _command_gripper(self, gripper: Gripper, value: float) -> None:
        if gripper.action == "binary":
            self._open = value > 0.0
            self.gripper = gripper.open if self._open else gripper.closed
        else:
            self.gripper = min(max(value, gripper.closed), gripper.open)
            self._open = self.gripper > 0.5 * (gripper.closed + gripper.open)

    def _move(self, action: Array) -> None:
        raise NotImplementedError


class JointPositions(Motion):
    """Actions are joint positions."""

    def _move(self, action: Array) -> None:
        self.joints = action * self._robot.arm.radians


class JointDeltas(Motion):
    """Actions are changes of the joint targets."""

    def _move(self, action: Array) -> None:
        self.joints = self.joints + action * self._robot.arm.radians


class EndEffectorDeltas(Motion):
    """Actions move the commanded TCP pose, and inverse kinematics moves the joints after it."""

    def __init__(self, robot: RobotConfig, model: ArmKinematics, limits: PoseLimits) -> None:
        super().__init__(robot)
        self._model = model
        self._pose = CommandedPose(limits, 0.5 * (limits.workspace_low + limits.workspace_high))

    def resume(self, joints: Array) -> None:
        """See `Motion.resume`; the commanded pose is where these joints are."""
        super().resume(joints)
        self._pose.reset(*self._model.pose(self.joints))

    def save(self) -> tuple[Any, ...]:
        """See `Motion.save`."""
        return *super().save(), self._pose.position, self._pose.rpy

    def restore(self, saved: tuple[Any, ...]) -> None:
        """See `Motion.restore`."""
        *rest, self._pose.position, self._pose.rpy = saved
        super().restore(tuple(rest))

    @property
    def commanded(self) -> dict[str, Array | float | None]:
        """See `Motion.commanded`."""
        yaw = self._pose.rpy[2]
        return {
            **super().commanded,
            "commanded_position": self._pose.position,
            "commanded_yaw_cos_sin": np.array([np.cos(yaw), np.sin(yaw)]),
        }

    def _move(self, action: Array) -> None:
        self._pose.advance(np.clip(action, -1.0, 1.0))
        self.joints = self._model.solve(self.joints, self._pose.position, self._pose.matrix)
        self._pose.follow(*self._model.pose(self.joints))


def make_motion(robot: RobotConfig, model: ArmKinematics | None) -> Motion:
    """The motion that a robot's file names."""
    if robot.action.kind == "joint_position":
        return JointPositions(robot)
    if robot.action.kind == "joint_delta":
        return JointDeltas(robot)
    assert model is not None  # `robot_file` has seen to it
    assert robot.action.pose is not None
    return EndEffectorDeltas(robot, model, robot.action.pose)
