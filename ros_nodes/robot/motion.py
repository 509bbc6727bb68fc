"""From a policy's actions to the arm's joint targets and the gripper's opening, one step of the policy at a time."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import ArmKinematics, Array, CommandedPose
from ros_nodes.robot.robot_file import RobotConfig


class Motion:
    """Where the arm shall be at the end of the step that runs; actions do what ``robot.action.kind`` says.

    Attributes:
        joints: (J,) targets [rad].
        gripper: Opening [m]; None while no action has set it.
    """

    def __init__(self, robot: RobotConfig, model: ArmKinematics | None = None) -> None:
        self._robot, self._model = robot, model
        self.joints: Array = np.zeros(len(robot.arm.joints))
        self.gripper: float | None = None
        self._open = True
        limits = robot.action.pose
        # The commanded TCP pose; inverse kinematics moves the joints after it.
        self._pose = CommandedPose(limits, 0.5 * (limits.workspace_low + limits.workspace_high)) if limits else None

    def restart(self, joints: Array, opening: float | None) -> None:
        """Start from joints (J,) [rad] and a gripper's opening [m] as measured; nothing is commanded yet."""
        self.gripper = None
        if self._robot.gripper is not None and opening is not None:
            self._open = opening > 0.5 * (self._robot.gripper.closed + self._robot.gripper.open)
        self.resume(joints)

    def resume(self, joints: Array) -> None:
        """Go on from joints (J,) [rad], where the arm was held; the gripper's command stays."""
        self.joints = np.array(joints, dtype=np.float64)
        if self._pose is not None and self._model is not None:
            position, matrix = self._model.pose(self.joints)
            self._pose.reset(position, matrix)
            # An arm that is outside is not thrown inside: it may stay, or come.
            limits = self._robot.action.pose
            assert limits is not None
            self._pose.limits = replace(
                limits,
                workspace_low=np.minimum(limits.workspace_low, position),
                workspace_high=np.maximum(limits.workspace_high, position),
                max_tilt=max(limits.max_tilt, *np.abs(self._pose.rpy[:2])),
                max_yaw=max(limits.max_yaw, abs(self._pose.rpy[2])),
            )

    def copy(self) -> Motion:
        """Where everything is now: one that may go ahead, or come back by `restore`."""
        other = copy(self)
        other._pose = copy(self._pose)
        return other

    def restore(self, other: Motion) -> None:
        """Undo what was done since `other` was copied."""
        vars(self).update(vars(other.copy()))

    def advance(self, action: Array, low: Array | float = -np.inf, high: Array | float = np.inf) -> None:
        """Execute one action (A,); an increment ends between the joints `low` and `high` (J,) [rad].

        Raises:
            ConfigError: Another length, or not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self._robot.action_dim,) or not np.isfinite(action).all():
            raise ConfigError(f"The action is {action.tolist()}; give {self._robot.action_dim} finite numbers.")
        gripper = self._robot.gripper
        if gripper is not None and gripper.action != "none":
            value, action = float(action[-1]), action[:-1]
            if gripper.action == "binary":
                self.gripper = gripper.open if value > 0.0 else gripper.closed
            else:
                self.gripper = min(max(gripper.policy.ours(value), gripper.closed), gripper.open)
            self._open = self.gripper > 0.5 * (gripper.closed + gripper.open)
        if self._pose is not None:
            assert self._model is not None  # `robot_file` has seen to it
            self._pose.advance(np.clip(action, -1.0, 1.0))
            self.joints = np.clip(self._model.solve(self.joints, self._pose.position, self._pose.matrix), low, high)
            self._pose.follow(*self._model.pose(self.joints))
        else:
            absolute = self._robot.action.kind == "joint_position"
            units = self._robot.arm.units
            self.joints = units.ours(action) if absolute else np.clip(self.joints + action * units.scale, low, high)

    @property
    def commanded(self) -> dict[str, Array | float | None]:
        """The commanded parts of a policy's state."""
        parts: dict[str, Array | float | None] = {"commanded_gripper": 1.0 if self._open else -1.0}
        if self._pose is not None:
            yaw = self._pose.rpy[2]
            parts["commanded_position"] = self._pose.position
            parts["commanded_yaw_cos_sin"] = np.array([np.cos(yaw), np.sin(yaw)])
        return parts
