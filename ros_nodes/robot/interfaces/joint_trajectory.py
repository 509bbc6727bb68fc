"""``joint_trajectory_controller``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.interfaces.base import (
    ActionInterface,
    Command,
    CommandedArm,
    register_interface,
)
from ceed_vla.ros_nodes.robot.ros_types import message_class
from ceed_vla.ros_nodes.robot.yaml_fields import Fields


@register_interface("joint_trajectory")
class JointTrajectories(ActionInterface):
    """Sends the next command followed by a stop within ``stop_time``, in case no command follows.

    The stop lies inside the position limits and, like the command, within `limits.step` of the
    measured position. Stamp 0 starts a trajectory on arrival; each replaces the previous one.
    """

    message_type = "trajectory_msgs/msg/JointTrajectory"

    def __init__(self, settings: Fields) -> None:
        super().__init__(settings)
        self._stop_time = settings.number("stop_time", 0.01, 1.0, default=0.1)  # [s]

    def message(self, command: Command, arm: CommandedArm) -> Any:
        at = command.positions
        time = self._stop_time
        low = np.minimum(np.maximum(arm.low, command.measured - arm.step), at)
        high = np.maximum(np.minimum(arm.high, command.measured + arm.step), at)
        # With a higher speed, a cubic to a stop would overshoot the limits.
        speeds = np.clip(command.velocities, 3.0 * (low - at) / time, 3.0 * (high - at) / time)
        stop = np.clip(at + 0.5 * time * speeds, low, high)
        points = [
            _point(arm.period, at, speeds),
            _point(arm.period + self._stop_time, stop, np.zeros_like(stop)),
        ]
        return self.message_class(joint_names=list(arm.joints), points=points)


def _point(after: float, positions: Array, velocities: Array) -> Any:
    seconds, nanoseconds = divmod(round(1e9 * after), 10**9)
    time = message_class("builtin_interfaces/msg/Duration")(sec=seconds, nanosec=nanoseconds)
    return message_class("trajectory_msgs/msg/JointTrajectoryPoint")(
        positions=positions.tolist(), velocities=velocities.tolist(), time_from_start=time
    )
