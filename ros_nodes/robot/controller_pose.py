"""Tracks the arm's pose while commands are held. Free of ROS and of clocks."""

from __future__ import annotations

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.controller_states import BLIND_HOLD
from ceed_vla.ros_nodes.robot.safety import Hold


class PoseWatch:
    """Times how long the pose is unknown, and detects an arm that is moved during a hold.

    Attributes:
        refusal: Why motion does not restart although the pose is known; None if it may restart.
    """

    def __init__(self) -> None:
        self.refusal: Hold | None = None
        self._unknown_since: float | None = None  # steady time [s]
        self._held_at: Array | None = None  # (J,) [rad], pose at which the present hold began

    @property
    def unknown(self) -> bool:
        """Whether the pose was unknown at the last tick."""
        return self._unknown_since is not None

    def note_pose(self, *, known: bool, now: float) -> bool:
        """Record whether the pose is known at steady time `now` [s].

        Returns:
            Whether it has been unknown for longer than `BLIND_HOLD`.
        """
        since = self._unknown_since
        if known:
            self._unknown_since = None
            return False
        if since is None:
            self._unknown_since = now
            return False
        return now - since > BLIND_HOLD

    def note_hold(self, measured: Array | None) -> None:
        """Record that a command was held, at the last trusted pose (J,) [rad]."""
        if self._held_at is None:
            self._held_at = measured

    def left(self, measured: Array | None, most: Array) -> bool:
        """Whether a joint of the pose (J,) is further than `most` (J,) [rad] from the pose at which
        the hold began.
        """
        if self._held_at is None or measured is None:
            return False
        return bool(np.any(np.abs(measured - self._held_at) > most))

    def forget_time(self) -> None:
        """Restart the timer: the clock went back, and earlier times cannot be compared."""
        self._unknown_since = None

    def forget_hold(self) -> None:
        """Forget the pose of the hold: no command is held any more."""
        self._held_at = None
