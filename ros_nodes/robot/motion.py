"""Converts a policy's actions to joint targets and gripper openings, one step at a time."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import ArmKinematics, Array, CommandedPose
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig

type Bound = Array | float  # of every joint [rad]
INF = np.inf


def toward(last: Array, goal: Array, speed: float, dt: float, braking: Array | None) -> Array:
    """Return the next command (J,) [rad] on the straight line from the `last` one to `goal`.

    Args:
        last: The last command (J,) [rad].
        goal: Target (J,) [rad].
        speed: Speed of the joint with the longest way [rad/s].
        dt: Time until the next command [s].
        braking: Acceleration limit (J,) [rad/s^2] of the safety filter, or None. The filter brakes
            for the requested command, so the result lies far enough ahead that it need not.
    """
    way = goal - last
    velocity = way * min(speed / max(float(np.abs(way).max()), 1e-9), 1.0 / dt)
    ahead = np.abs(velocity) * dt
    if braking is not None:
        ahead = ahead + velocity**2 / (2.0 * braking)
    command: Array = last + np.clip(way, -ahead, ahead)
    return command


@dataclass(frozen=True)
class HomeMove:
    """A slow move to a pose, without the policy."""

    goal: Array  # (J,) [rad]
    speed: float  # of the joint with the longest way [rad/s]

    def command(self, last: Array, dt: float, braking: Array | None) -> Array:
        """Return the command (J,) [rad] after the `last` one, as `toward`."""
        return toward(last, self.goal, self.speed, dt, braking)

    def reached_by(self, command: Array) -> bool:
        """Whether a command (J,) [rad] equals the goal, except for rounding."""
        return bool(np.allclose(command, self.goal, rtol=0.0, atol=1e-9))


class Motion:
    """Target of the arm at the end of the running step; ``robot.action.kind`` defines the actions.

    Attributes:
        joints: Targets (J,) [rad].
        gripper: Opening [m]; None until an action sets it.
    """

    def __init__(self, robot: RobotConfig, model: ArmKinematics | None = None) -> None:
        self._robot = robot
        self._model = model
        self.joints: Array = np.zeros(len(robot.arm.joints))
        self.gripper: float | None = None
        self._open = True
        limits = robot.action.pose
        # The commanded TCP pose; inverse kinematics derives the joints from it.
        self._pose = (
            CommandedPose(limits, 0.5 * (limits.workspace_low + limits.workspace_high))
            if limits
            else None
        )

    def restart(self, joints: Array, opening: float | None) -> None:
        """Start from measured joints (J,) [rad] and a measured gripper opening [m], without a
        command.
        """
        self.gripper = None
        if self._robot.gripper is not None and opening is not None:
            self._open = opening > 0.5 * (self._robot.gripper.closed + self._robot.gripper.open)
        self.resume(joints)

    def resume(self, joints: Array) -> None:
        """Continue from joints (J,) [rad] at which the arm held; the gripper's command stays."""
        self.joints = np.array(joints, dtype=np.float64)
        limits = self._robot.action.pose
        if self._pose is not None and self._model is not None and limits is not None:
            self._pose.reset(*self._model.pose(self.joints))
            self._pose.limits = limits.widened(self._pose)

    def grip(self, opening: float | None) -> None:
        """Continue from an opening [m] that was commanded otherwise; None: from the own one."""
        gripper = self._robot.gripper
        if gripper is not None and opening is not None:
            self.gripper = opening
            self._open = opening > 0.5 * (gripper.closed + gripper.open)

    def copy(self) -> Motion:
        """Return a copy of the state, to advance independently or to pass to `restore`."""
        other = copy(self)
        other._pose = copy(self._pose)
        return other

    def restore(self, other: Motion) -> None:
        """Undo all changes since `other` was copied."""
        vars(self).update(vars(other.copy()))

    def advance(
        self,
        action: Array,
        base: Array | None = None,
        reach: Bound = INF,
        low: Bound = -INF,
        high: Bound = INF,
    ) -> None:
        """Execute one action (A,).

        Args:
            action: Values (A,) as ``robot.action.kind`` defines them.
            base: Joints (J,) [rad] from which an increment is limited; None: the present targets.
            reach: Largest distance of an increment's end from `base` [rad].
            low: Lowest position at an increment's end [rad].
            high: Highest position at an increment's end [rad].

        `ConfigError`: The action has another length, or is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self._robot.action_dim,) or not np.isfinite(action).all():
            raise ConfigError(
                f"The action is {action.tolist()}; give {self._robot.action_dim} finite numbers."
            )
        gripper = self._robot.gripper
        if gripper is not None and gripper.action != "none":
            value = float(action[-1])
            action = action[:-1]
            if gripper.action == "binary":
                self.gripper = gripper.open if value > 0.0 else gripper.closed
            else:
                self.gripper = min(max(gripper.policy.ours(value), gripper.closed), gripper.open)
            self._open = self.gripper > 0.5 * (gripper.closed + gripper.open)
        limits = self._robot.action.pose
        if self._pose is not None and limits is not None:
            assert self._model is not None  # `robot_file` validates it
            self._pose.advance(np.clip(action, -1.0, 1.0))
            start = self.joints if base is None else base
            way = self._model.solve(self.joints, self._pose.position, self._pose.matrix) - start
            # All joints slow down together, so the direction of the tool does not change.
            share = min(1.0, float(np.min(reach / np.maximum(np.abs(way), 1e-12))))
            self.joints = np.clip(start + share * way, low, high)
            self._pose.follow(*self._model.pose(self.joints))
            self._pose.limits = limits.widened(self._pose, self._pose.limits)
        elif self._robot.action.kind == "joint_position":
            self.joints = self._robot.arm.units.ours(action)
        else:
            start = self.joints if base is None else base
            wanted = self.joints + action * self._robot.arm.units.scale
            self.joints = np.clip(np.clip(wanted, start - reach, start + reach), low, high)

    @property
    def commanded(self) -> dict[str, Array | float | None]:
        """The commanded parts of a policy's state."""
        parts: dict[str, Array | float | None] = {"commanded_gripper": 1.0 if self._open else -1.0}
        if self._pose is not None:
            yaw = self._pose.rpy[2]
            parts["commanded_position"] = self._pose.position
            parts["commanded_yaw_cos_sin"] = np.array([np.cos(yaw), np.sin(yaw)])
        return parts
