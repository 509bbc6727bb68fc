"""Applies a command message to the simulated robot, as a ros2_control robot would."""

from __future__ import annotations

from typing import Any

from geometry_msgs.msg import TwistStamped
from trajectory_msgs.msg import JointTrajectory

from ceed_vla.errors import SimulationError
from ceed_vla.ros_nodes.robot.messages import seconds
from ceed_vla.ros_nodes.simulated.robot import SimRobot


def obey(robot: SimRobot, message: Any, now: float) -> None:
    """Execute positions (Float64MultiArray), a trajectory or a twist.

    `now` is the time on the clock of the stamps [s]. `SimulationError`: A controller would refuse
    the message.
    """
    if isinstance(message, TwistStamped):
        linear, angular = message.twist.linear, message.twist.angular
        robot.command_twist((linear.x, linear.y, linear.z), (angular.x, angular.y, angular.z))
    elif isinstance(message, JointTrajectory):
        stamp = seconds(message.header.stamp)
        points = message.points
        moving = [len(point.velocities) > 0 for point in points]
        if any(moving) and not all(moving):
            raise SimulationError(
                "Some way-points have velocities and some have none; give all or none."
            )
        robot.command_trajectory(
            list(message.joint_names),
            [seconds(point.time_from_start) for point in points],
            [list(point.positions) for point in points],
            [list(point.velocities) for point in points] if any(moving) else None,
            delay=stamp - now if stamp else 0.0,
        )
    else:
        robot.command_positions(message.data)
