"""The kinematics of a robot file's arm. Free of ROS; MuJoCo is imported for a file with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ceed_vla.ros_nodes.robot.robot_config import RobotConfig

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm


def arm_model(robot: RobotConfig) -> ModelArm | None:
    """Return the arm's kinematics; None if the robot's file names no model."""
    if robot.arm.model is None:
        return None
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

    arm, step = robot.arm, robot.action.max_joint_step
    return ModelArm(robot.arm.model, arm.tcp, arm.joints, home=arm.home, max_joint_step=step)
