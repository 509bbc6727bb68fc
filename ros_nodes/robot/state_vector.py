"""State features of a policy, from measured joints and what was commanded. Free of ROS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.robot_config import POSE_COMPONENTS, RobotConfig

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

# Component of a state -> field of the joint state that it is read from.
MEASURED = {
    "joint_positions": "position",
    "joint_velocities": "velocity",
    "joint_efforts": "effort",
}


def measured_fields(
    robot: RobotConfig, features: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Component -> field of the joint state, for all components that the `features` (by default all
    of the robot's file) have, and the positions.
    """
    chosen = robot.states if features is None else features
    parts = {"joint_positions", *(part for feature in chosen for part in robot.states[feature])}
    return {part: values for part, values in MEASURED.items() if part in parts}


def state_vector(
    robot: RobotConfig,
    model: ModelArm | None,
    feature: str,
    joints: Mapping[str, Array],
    opening: float | None,
    commanded: Mapping[str, Any],
) -> NDArray[np.float32]:
    """Return a state feature (D,) in the policy's units.

    Args:
        robot: The robot's file.
        model: The arm's kinematics; None if no component needs it.
        feature: Name of the feature in the file.
        joints: Component of `MEASURED` -> values (J,) of the arm [rad], [rad/s], [N m].
        opening: Measured opening of the gripper [m]; None without a gripper.
        commanded: The commanded components, see `Motion.commanded`.
    """
    parts = robot.states[feature]
    units = robot.arm.units
    gripper = robot.gripper
    positions = joints["joint_positions"]
    values: dict[str, Any] = {
        **joints,
        **commanded,
        "joint_positions": units.theirs(positions),
    }
    if "joint_velocities" in values:
        values["joint_velocities"] = values["joint_velocities"] / units.scale
    if "joint_efforts" in values:  # [N m]; the unit of angles changes only the sign
        values["joint_efforts"] = values["joint_efforts"] * np.sign(units.scale)
    if gripper is not None and opening is not None:
        values["finger_opening"] = gripper.policy.theirs(opening)
    if model is not None and set(POSE_COMPONENTS) & set(parts):
        values["tcp_position"], matrix = model.pose(positions)
        values["tcp_quaternion"] = model.quaternion(matrix)
    return np.concatenate([np.atleast_1d(values[part]) for part in parts]).astype(np.float32)
