"""What the controller notes about the arm's pose while commands are held. Free of ROS and of
clocks.
"""

from __future__ import annotations

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.controller_states import BLIND_HOLD
from ceed_vla.ros_nodes.robot.safety import Hold


class PoseWatch:
    """Times how long the pose is unknown, and finds an arm that is moved during a hold.

    Attributes:
        refusal: Why motion does not restart, though the pose is known.
    """

    def __init__(self) -> None:
        self.refusal: Hold | None = None
        self._unknown_since: float | None = None  # steady time [s]
        self._held_at: Array | None = None  # (J,) [rad], where the present hold began

    @property
    def unknown(self) -> bool:
        """Whether the pose was unknown at the last tick."""
        return self._unknown_since is not None

    def note_pose(self, *, known: bool, now: float) -> bool:
        """Note whether the pose is known at steady time `now` [s].

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
        """A command was held, at the last trusted pose (J,) [rad]."""
        if self._held_at is None:
            self._held_at = measured

    def left(self, measured: Array | None, most: Array) -> bool:
        """Whether a joint of the pose (J,) [rad] is further than `most` (J,) [rad] from where the
        hold began.
        """
        if self._held_at is None or measured is None:
            return False
        return bool(np.any(np.abs(measured - self._held_at) > most))

    def forget_time(self) -> None:
        """The clock went back: the time of before cannot be compared."""
        self._unknown_since = None

    def forget_hold(self) -> None:
        """No command is held any more."""
        self._held_at = None
