"""A device that sends velocities of the TCP, such as a space mouse."""

from __future__ import annotations

from typing import Any

import numpy as np

from ceed_vla.ros_nodes.robot.intervention.base import (
    Body,
    Device,
    Wish,
    finite,
    register_device,
)
from ceed_vla.ros_nodes.robot.yaml_fields import Fields


@register_device("twist")
class TwistDevice(Device):
    """Twists in the base frame."""

    message_type = "geometry_msgs/msg/TwistStamped"

    def __init__(self, settings: Fields, body: Body) -> None:
        super().__init__(settings, body)
        self._linear = settings.number("linear", 1e-3, 1.0, default=0.25)  # largest speed [m/s]
        self._angular = settings.number("angular", 1e-3, 3.0, default=1.0)  # [rad/s]
        # share of the largest speed above which the person takes over
        self._threshold = settings.number("threshold", 0.001, 1.0, default=0.02)

    def read(self, message: Any, now: float) -> Wish:
        linear, angular = message.twist.linear, message.twist.angular
        twist = finite(
            [linear.x, linear.y, linear.z, angular.x, angular.y, angular.z], "velocities"
        )
        most = np.array([self._linear] * 3 + [self._angular] * 3)
        active = bool(np.any(np.abs(twist) > self._threshold * most))
        return Wish(active, twist=np.clip(twist, -most, most))
