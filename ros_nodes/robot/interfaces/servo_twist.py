"""MoveIt Servo with ``command_in_type: speed_units``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.kinematics import Array, turn_vector
from ceed_vla.ros_nodes.robot.interfaces.base import (
    ActionInterface,
    Command,
    CommandedArm,
    register_interface,
)
from ceed_vla.ros_nodes.robot.yaml_fields import Fields

CORRECTION = 0.1  # largest speed of the correction [m/s]
TURN_CORRECTION = 0.3  # and of its rotation [rad/s]


@register_interface("servo_twist")
class ServoTwists(ActionInterface):
    """Sends the velocity of the commanded TCP, in the base frame; a hold is a zero twist.

    Velocities alone would drift from the commanded pose, so the measured distance times ``gain`` is
    added. This correction is slow: an arm that MoveIt Servo has halted for a while, and then
    releases, does not race after the command.
    """

    message_type = "geometry_msgs/msg/TwistStamped"
    needs_model = True
    commands_joints = False

    def __init__(self, settings: Fields) -> None:
        super().__init__(settings)
        self._frame = settings.text("frame")
        self._gain = settings.number("gain", 0.0, 50.0, default=0.3)  # [1/s]
        self._max_linear = settings.number("max_linear", 1e-3, 5.0, default=1.0)  # [m/s]
        self._max_angular = settings.number("max_angular", 1e-3, 10.0, default=3.0)  # [rad/s]

    def message(self, command: Command, arm: CommandedArm) -> Any:
        message = self.message_class()
        message.header.stamp, message.header.frame_id = command.stamp, self._frame
        if command.velocities.any():
            twist = message.twist
            for vector, values in zip(
                (twist.linear, twist.angular), self._twist(command, arm), strict=True
            ):
                vector.x, vector.y, vector.z = values.tolist()
        return message

    def _twist(self, command: Command, arm: CommandedArm) -> tuple[Array, Array]:
        """Linear (3,) [m/s] and angular velocity (3,) [rad/s]."""
        assert arm.model is not None
        now, turned = arm.model.pose(command.positions)
        before, was_turned = arm.model.pose(command.positions - arm.period * command.velocities)
        actual, is_turned = arm.model.pose(command.measured)
        linear = (now - before) / arm.period
        linear = linear + _shorten(self._gain * (now - actual), CORRECTION)
        angular = turn_vector(turned @ was_turned.T) / arm.period
        correction = self._gain * turn_vector(turned @ is_turned.T)
        angular = angular + _shorten(correction, TURN_CORRECTION)
        return _shorten(linear, self._max_linear), _shorten(angular, self._max_angular)


def _shorten(vector: Array, limit: float) -> Array:
    size = float(np.linalg.norm(vector))
    return vector if size <= limit else vector * (limit / size)
