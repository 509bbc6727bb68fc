"""Why the arm must hold though the safety filter has no reason. Free of ROS and of clocks."""

from __future__ import annotations

import math

from ceed_vla.ros_nodes.robot.mode import WAITING
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.safety import Hold


class Objections:
    """Collects what a conflict, the policy and the images object to.

    Attributes:
        conflict: What else commands the arm or publishes its joints; None if nothing does.
        allowed_at: When motion was allowed, on the messages' clock [s]: images from before are of
            another situation.
    """

    def __init__(self, observations: Observations, stream: PolicyStream) -> None:
        self.conflict: str | None = None
        self.allowed_at = -math.inf
        self._observations = observations
        self._stream = stream

    def conflict_hold(self) -> Hold | None:
        """The hold of a conflict; None without one."""
        return None if self.conflict is None else Hold("conflict", self.conflict)

    def first(self) -> Hold | None:
        """The objection that counts now; None without any."""
        objection = self.conflict_hold() or self._stream.objection()
        if objection is not None:
            return objection
        taken = self._observations.image_stamp
        if taken is not None and taken < self.allowed_at:
            return Hold(WAITING, "for images taken after motion was enabled")
        return None
