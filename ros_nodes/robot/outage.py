"""Measures how long an input or the policy has been at fault. Free of ROS and of clocks."""

from __future__ import annotations

from collections.abc import Collection

from ceed_vla.ros_nodes.robot.mode import HARMLESS, STARVED
from ceed_vla.ros_nodes.robot.safety import Hold

RESUME_WITHIN = 5.0  # default of the longest outage after which motion resumes automatically [s]


class Outage:
    """Times the present hold; an outage longer than `within` [s] needs an operator."""

    def __init__(self, within: float) -> None:
        self.within = within
        self._since: float | None = None  # steady time at which the outage began [s]

    def forget(self) -> None:
        """End the outage, because motion is forbidden or continues."""
        self._since = None

    def over(self, hold: Hold | None, ages: Collection[float | None], now: float) -> str:
        """Take the hold of the last tick, at steady time `now` [s], and the inputs' ages [s].

        Returns why motion must not resume by itself; "" if it may. An input that never arrived is
        not an outage, nor is a first chunk that is not there yet; a policy that does not answer in
        motion is.
        """
        missing = hold is not None and hold.code == "stale" and None in ages
        harmless = hold is None or (hold.code in HARMLESS and hold.code != STARVED)
        if hold is None or harmless or missing:
            self._since = None
            return ""
        if self._since is None:
            self._since = now
        if now - self._since <= self.within:
            return ""
        return f"after more than {self.within:g} s (resume_within) of {hold.code}: {hold.detail}"
