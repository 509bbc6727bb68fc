"""Reasons for a hold that the safety filter does not have. Free of ROS and of clocks."""

from __future__ import annotations

import math

from ceed_vla.ros_nodes.robot.mode import WAITING
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.policy_stream import PolicyStream
from ceed_vla.ros_nodes.robot.safety import Hold


class Objections:
    """Collects the objections of a conflict, the policy and the images.

    Attributes:
        conflict: What else commands the arm or publishes its joints; None if nothing does.
        allowed_at: Time at which motion was allowed, on the messages' clock [s]; images from before
            show another situation.
    """

    def __init__(self, observations: Observations, stream: PolicyStream) -> None:
        self.conflict: str | None = None
        self.allowed_at = -math.inf
        self._observations = observations
        self._stream = stream

    def conflict_hold(self) -> Hold | None:
        """Return the hold for a conflict; None without a conflict."""
        return None if self.conflict is None else Hold("conflict", self.conflict)

    def first(self) -> Hold | None:
        """Return the objection with the highest priority; None without any."""
        objection = self.conflict_hold() or self._stream.objection()
        if objection is not None:
            return objection
        taken = self._observations.image_stamp
        if taken is not None and taken < self.allowed_at:
            return Hold(WAITING, "for images taken after motion was enabled")
        return None


def after_conflict(reason: str) -> str:
    """Return why motion is disabled after a conflict."""
    return with_remedy(f"there was a conflict: {reason}")


def with_remedy(why: str) -> str:
    """Return a reason for disabled motion together with its remedy."""
    return f"{why}; see where the arm is, then call ~/enable"
