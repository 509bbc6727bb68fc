"""A gamepad or joystick."""

from __future__ import annotations

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

DIRECTIONS = ("x", "y", "z", "roll", "pitch", "yaw")
_NONE = -1  # number of an axis or button that is not used
_MOST = 63  # largest number of an axis or button


@register_device("joy")
class Gamepad(Device):
    """Axes move the TCP; buttons open and close the gripper, and may be what takes over."""

    message_type = "sensor_msgs/msg/Joy"

    def __init__(self, settings: Fields, body: Body) -> None:
        super().__init__(settings, body)
        axes = settings.child("axes")
        self._axes = [_index(axes, name) for name in DIRECTIONS]
        inverted = settings.texts("inverted", DIRECTIONS, default=())
        linear = settings.number("linear", 1e-3, 1.0, default=0.1)  # of a full deflection [m/s]
        angular = settings.number("angular", 1e-3, 3.0, default=0.5)  # [rad/s]
        signs = np.array([-1.0 if name in inverted else 1.0 for name in DIRECTIONS])
        self._speed = signs * np.array([linear] * 3 + [angular] * 3)
        self._threshold = settings.number("threshold", 0.01, 1.0, default=0.1)
        self._button = _index(settings, "button")
        self._open = _index(settings, "open")
        self._close = _index(settings, "close")

    def read(self, message: Any, now: float) -> Wish:
        axes = finite(message.axes, "axes")
        deflection = np.array([_axis(axes, index) for index in self._axes])
        buttons = list(message.buttons)
        opening = None
        if _pressed(buttons, self._open):
            opening = self._body.open
        elif _pressed(buttons, self._close):
            opening = self._body.closed
        moved = bool(np.abs(deflection).max() > self._threshold)
        return Wish(
            active=moved or opening is not None,
            twist=self._twist(deflection),
            opening=opening,
            button=_pressed(buttons, self._button) if self._button != _NONE else None,
        )

    def _twist(self, deflection: Array) -> Array:
        """Velocity (6,) of a deflection (6,); within the threshold it is zero."""
        beyond = np.clip(np.abs(deflection) - self._threshold, 0.0, None) / (1.0 - self._threshold)
        twist: Array = self._speed * np.sign(deflection) * np.minimum(beyond, 1.0)
        return twist


def _index(settings: Fields, name: str) -> int:
    """The number of an axis or a button; `_NONE` if the file does not name one."""
    if name not in settings:
        return _NONE
    value = settings.number(name, 0, _MOST)
    if value != int(value):
        raise settings.error(name, f"is {value}; give a whole number")
    return int(value)


def _axis(axes: Array, index: int) -> float:
    if index == _NONE:
        return 0.0
    if index >= len(axes):
        raise ObservationError(f"The device has {len(axes)} axes; the robot's file uses {index}.")
    return float(axes[index])


def _pressed(buttons: list[int], index: int) -> bool:
    if index >= len(buttons):
        raise ObservationError(
            f"The device has {len(buttons)} buttons; the robot's file uses {index}."
        )
    return index != _NONE and bool(buttons[index])
