"""From a policy's actions to the arm's joint targets and the gripper's opening, one step of the
policy at a time.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import ArmKinematics, Array, CommandedPose, PoseLimits
from ceed_vla.ros_nodes.robot.robot_file import RobotConfig

type Bound = Array | float  # of every joint [rad]
INF = np.inf


def toward(last: Array, goal: Array, speed: float, dt: float, braking: Array | None) -> Array:
    """The next command (J,) [rad] on the straight way from the `last` one to `goal`.

    Args:
        last: (J,) [rad].
        goal: (J,) [rad].
        speed: Of the joint with the longest way [rad/s].
        dt: Until the next command [s].
        braking: Acceleration (J,) [rad/s^2] of the safety filter, which brakes for what is wanted;
            so this lies so far ahead that it need not. None without.
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
        """The command (J,) [rad] after the `last` one; arguments and result as in `toward`."""
        return toward(last, self.goal, self.speed, dt, braking)

    def reached_by(self, command: Array) -> bool:
        """Whether a command (J,) [rad] is the goal, but for rounding."""
        return bool(np.allclose(command, self.goal, rtol=0.0, atol=1e-9))


class Motion:
    """Where the arm is to be at the end of the running step; actions mean what
    ``robot.action.kind`` says.

    Attributes:
        joints: (J,) targets [rad].
        gripper: Opening [m]; None while no action has set it.
    """

    def __init__(self, robot: RobotConfig, model: ArmKinematics | None = None) -> None:
        self._robot = robot
        self._model = model
        self.joints: Array = np.zeros(len(robot.arm.joints))
        self.gripper: float | None = None
        self._open = True
        limits = robot.action.pose
        # The commanded TCP pose; inverse kinematics moves the joints after it.
        self._pose = (
            CommandedPose(limits, 0.5 * (limits.workspace_low + limits.workspace_high))
            if limits
            else None
        )

    def restart(self, joints: Array, opening: float | None) -> None:
        """Start from joints (J,) [rad] and a gripper's opening [m] as measured; nothing is
        commanded yet.
        """
        self.gripper = None
        if self._robot.gripper is not None and opening is not None:
            self._open = opening > 0.5 * (self._robot.gripper.closed + self._robot.gripper.open)
        self.resume(joints)

    def resume(self, joints: Array) -> None:
        """Go on from joints (J,) [rad], where the arm was held; the gripper's command stays."""
        self.joints = np.array(joints, dtype=np.float64)
        if self._pose is not None and self._model is not None:
            self._pose.reset(*self._model.pose(self.joints))
            self._pose.limits = self._fence(self._pose)

    def _fence(self, pose: CommandedPose, old: PoseLimits | None = None) -> PoseLimits:
        """The robot's limits, and as far as a commanded `pose` is outside: it may stay, or come;
        `old` ones hold.
        """
        limits = self._robot.action.pose
        low = pose.position
        high = pose.position
        tilt = float(np.abs(pose.rpy[:2]).max())
        yaw = float(abs(pose.rpy[2]))
        assert limits is not None
        if old is not None:
            low = np.maximum(low, old.workspace_low)
            high = np.minimum(high, old.workspace_high)
            tilt = min(tilt, old.max_tilt)
            yaw = min(yaw, old.max_yaw)
        return replace(
            limits,
            workspace_low=np.minimum(limits.workspace_low, low),
            workspace_high=np.maximum(limits.workspace_high, high),
            max_tilt=max(limits.max_tilt, tilt),
            max_yaw=max(limits.max_yaw, yaw),
        )

    def copy(self) -> Motion:
        """A copy of everything: it can be advanced by itself, or be given to `restore`."""
        other = copy(self)
        other._pose = copy(self._pose)
        return other

    def restore(self, other: Motion) -> None:
        """Undo everything since `other` was copied."""
        vars(self).update(vars(other.copy()))

    def advance(
        self,
        action: Array,
        base: Array | None = None,
        reach: Bound = INF,
        low: Bound = -INF,
        high: Bound = INF,
    ) -> None:
        """Execute one action (A,); an increment ends within `reach` of the joints `base`, and of
        `low` to `high` [rad].

        `ConfigError`: Another length, or not finite.
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
        if self._pose is not None:
            assert self._model is not None  # `robot_file` has checked it
            self._pose.advance(np.clip(action, -1.0, 1.0))
            start = self.joints if base is None else base
            way = self._model.solve(self.joints, self._pose.position, self._pose.matrix) - start
            # All joints slow down together, so the tool keeps its way.
            share = min(1.0, float(np.min(reach / np.maximum(np.abs(way), 1e-12))))
            self.joints = np.clip(start + share * way, low, high)
            self._pose.follow(*self._model.pose(self.joints))
            self._pose.limits = self._fence(self._pose, self._pose.limits)
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
