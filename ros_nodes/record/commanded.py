"""From what an arm was commanded to a policy's actions, and to the commanded parts of its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.kinematics import Array, matrix_rpy, turn_vector
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm


@dataclass(frozen=True)
class Commanded:
    """What the arm was commanded at one time.

    Attributes:
        joints: Positions (J,) [rad].
        opening: Of the gripper [m]; None without a gripper, or before its first command.
        source: Who commanded it, such as "policy" or "person"; "" if unknown.
    """

    joints: Array
    opening: float | None
    source: str = ""


class ActionMaker:
    """The inverse of `Motion`: the action that leads from one command to the next.

    Attributes:
        clipped: Number of end-effector actions that were larger than a full action.
    """

    def __init__(self, robot: RobotConfig, model: ModelArm | None) -> None:
        self._robot = robot
        self._model = model
        self.clipped = 0

    def action(self, before: Commanded, after: Commanded) -> NDArray[np.float32]:
        """Return the action (A,) of a step.

        Args:
            before: The command at the begin of the step.
            after: The command at its end.
        """
        kind = self._robot.action.kind
        units = self._robot.arm.units
        if kind == "ee_delta":
            values = self._pose_change(before, after)
        elif kind == "joint_position":
            values = units.theirs(after.joints)
        else:
            values = (after.joints - before.joints) / units.scale
        gripper = self._robot.gripper
        if gripper is None or gripper.action == "none":
            return np.asarray(values, dtype=np.float32)
        if gripper.action == "binary":
            grip = 1.0 if self._is_open(after.opening) else -1.0
        else:
            grip = gripper.policy.theirs(gripper.open if after.opening is None else after.opening)
        return np.append(values, grip).astype(np.float32)

    def state_parts(self, commanded: Commanded) -> dict[str, Any]:
        """The commanded components of a state, as `Motion.commanded`."""
        parts: dict[str, Any] = {
            "commanded_gripper": 1.0 if self._is_open(commanded.opening) else -1.0
        }
        if self._robot.action.kind == "ee_delta":
            assert self._model is not None  # `robot_file` validates it
            position, matrix = self._model.pose(commanded.joints)
            yaw = matrix_rpy(matrix)[2]
            parts["commanded_position"] = position
            parts["commanded_yaw_cos_sin"] = np.array([np.cos(yaw), np.sin(yaw)])
        return parts

    def _pose_change(self, before: Commanded, after: Commanded) -> Array:
        limits = self._robot.action.pose
        assert limits is not None  # both are validated by `robot_file`
        assert self._model is not None
        start, start_matrix = self._model.pose(before.joints)
        end, end_matrix = self._model.pose(after.joints)
        moved = (end - start) / limits.position_scale
        turned = turn_vector(end_matrix @ start_matrix.T) / limits.rotation_scale
        values = np.concatenate([moved, turned])
        self.clipped += bool(np.abs(values).max() > 1.0)
        return np.clip(values, -1.0, 1.0)

    def _is_open(self, opening: float | None) -> bool:
        gripper = self._robot.gripper
        if gripper is None or opening is None:
            return True
        return opening > 0.5 * (gripper.closed + gripper.open)
