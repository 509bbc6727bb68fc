"""A leader arm, whose joints the robot follows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ceed_vla.errors import ObservationError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.intervention.base import (
    Body,
    Device,
    Wish,
    finite,
    register_device,
)
from ceed_vla.ros_nodes.robot.yaml_fields import Fields

_SPAN = 0.1  # time over which the leader's speed is measured [s]


@register_device("leader")
class LeaderArm(Device):
    """Joint positions of a second arm with as many joints."""

    message_type = "sensor_msgs/msg/JointState"
    moves_tcp = False

    def __init__(self, settings: Fields, body: Body) -> None:
        super().__init__(settings, body)
        self._joints = settings.texts("joints", default=body.joints)
        if len(self._joints) != len(body.joints):
            raise settings.error(
                "joints", f"names {len(self._joints)} joints; the arm has {len(body.joints)}"
            )
        self._gripper = settings.texts("gripper", default=())
        if self._gripper and body.open is None:
            raise settings.error("gripper", "is set, but the robot's file has no gripper")
        # speed of a joint above which the person takes over [rad/s]
        self._threshold = settings.number("threshold", 0.001, 10.0, default=0.1)
        self._past: list[tuple[float, Array]] = []  # steady times [s], and positions (J,) [rad]

    def read(self, message: Any, now: float) -> Wish:
        named = dict(zip(message.name, message.position, strict=False))
        missing = [name for name in (*self._joints, *self._gripper) if name not in named]
        if missing:
            raise ObservationError(f"The leader's joint state lacks {', '.join(missing)}.")
        joints = finite([named[name] for name in self._joints], "leader's positions")
        opening = None
        if self._gripper:
            fingers = finite([named[name] for name in self._gripper], "gripper's positions")
            opening = self._body.fingers_to_opening(float(fingers.sum()))
        return Wish(self._speed(joints, now) > self._threshold, joints=joints, opening=opening)

    def _speed(self, joints: Array, now: float) -> float:
        """Largest speed of a joint over the last `_SPAN` [rad/s]."""
        self._past.append((now, joints))
        while len(self._past) > 2 and now - self._past[1][0] >= _SPAN:
            del self._past[0]
        before, then = self._past[0]
        passed = now - before
        if not 0.0 < passed < math.inf:
            return 0.0
        return float(np.abs(joints - then).max()) / max(passed, _SPAN)
