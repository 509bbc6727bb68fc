"""Measures how long an input or the policy has been at fault. Free of ROS and of clocks."""

from __future__ import annotations

from collections.abc import Collection

from ceed_vla.ros_nodes.robot.mode import ANSWER, HARMLESS, STARVED, WAITING
from ceed_vla.ros_nodes.robot.safety import Hold

# Time for a first chunk, in longest outages: an answer that comes after one of them is dropped, and
# tells why; a policy that never answers hangs.
PATIENCE = 6
LEAST_ANSWER = 1.0  # time that an answer may take, however short outages are [s]
RESUME_WITHIN = 5.0  # default of the longest outage after which motion resumes automatically [s]


def answer_limit(within: float) -> float:
    """Longest time of an answer that is used [s], for outages of at most `within` [s]."""
    return max(within, LEAST_ANSWER)


class Outage:
    """Times the present hold; an outage longer than `within` [s] needs an operator."""

    def __init__(self, within: float) -> None:
        self.within = within
        self._since: float | None = None  # steady time at which the outage began [s]
        self._first = False  # whether it waits for a first chunk

    def forget(self) -> None:
        """End the outage, because motion is forbidden or continues."""
        self._since = None

    def over(self, hold: Hold | None, ages: Collection[float | None], now: float) -> str:
        """Take the hold of the last tick, at steady time `now` [s], and the inputs' ages [s].

        Returns why motion must not resume by itself; "" if it may. An input that never arrived is
        not an outage, nor is a policy that is still being loaded; one that does not answer is.
        """
        missing = hold is not None and hold.code == "stale" and None in ages
        first = hold is not None and hold.code == WAITING and hold.detail.startswith(ANSWER)
        harmless = hold is None or (hold.code in HARMLESS and hold.code != STARVED and not first)
        if hold is None or harmless or missing:
            self._since = None
            self._first = False
            return ""
        if self._since is None or now < self._since or self._first != first:  # time may go back
            self._since = now
            self._first = first
        wait = PATIENCE * answer_limit(self.within)  # for a first chunk
        if now - self._since <= (wait if first else self.within):
            return ""
        cause = hold.detail.partition("; ")[0]  # what helped before does not help now
        if first:
            return f"the policy has not answered for {wait:g} s; if again, clean up and configure"
        return f"after more than {self.within:g} s (resume_within) of {hold.code}: {cause}"
