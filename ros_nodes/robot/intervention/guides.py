"""Commands from what a person wants. Free of ROS and of clocks."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.intervention.base import Wish
from ceed_vla.ros_nodes.robot.motion import toward

# Speeds with which the arm follows a leader [rad/s]: just after the person took over, and once it
# has caught up; the safety filter limits more.
_FIRST_SPEED, _FULL_SPEED = 0.2, 3.0
_RAMP = 0.5  # time from the one speed to the other [s]


class Guide(Protocol):
    """Makes commands while the policy is not in charge.

    Attributes:
        grip_tolerance: Distance from the last opening within which a device's opening is followed
            [m].
    """

    grip_tolerance: float

    def begin(self, last: Array) -> None:
        """Begin at the last command (J,) [rad]."""

    def misaligned(self, wish: Wish, last: Array) -> str:
        """Why the person cannot take over at the last command (J,) [rad]; "" if they can."""

    def command(self, wish: Wish, last: Array, dt: float) -> Array:
        """Return the command (J,) [rad] that follows the `last` one after `dt` [s]."""


class LeaderGuide:
    """Follows the joints of a leader arm.

    Args:
        joints: Names (J,).
        max_step: Largest distance of the leader from the last command (J,) [rad].
        braking: Acceleration limit (J,) [rad/s^2]; None without one.
        grip_tolerance: See `Guide`.
    """

    def __init__(
        self,
        joints: tuple[str, ...],
        max_step: Array,
        braking: Array | None,
        grip_tolerance: float = 0.0,
    ) -> None:
        self.grip_tolerance = grip_tolerance
        self._speed = _FIRST_SPEED
        self._joints = joints
        self._max_step = max_step
        self._braking = braking

    def begin(self, last: Array) -> None:
        self._speed = _FIRST_SPEED

    def misaligned(self, wish: Wish, last: Array) -> str:
        assert wish.joints is not None
        far = np.abs(wish.joints - last) - self._max_step
        worst = int(np.argmax(far))
        if far[worst] <= 0.0:
            return ""
        away = abs(float(wish.joints[worst] - last[worst]))
        return (
            f"the leader's {self._joints[worst]} is {away:.2f} rad from the arm; at most "
            f"{self._max_step[worst]:.2f} (limits.step): align it"
        )

    def command(self, wish: Wish, last: Array, dt: float) -> Array:
        assert wish.joints is not None
        self._speed = min(self._speed + (_FULL_SPEED - _FIRST_SPEED) * dt / _RAMP, _FULL_SPEED)
        return toward(last, wish.joints, self._speed, dt, self._braking)
