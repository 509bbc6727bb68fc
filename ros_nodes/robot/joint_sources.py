"""Who publishes a joint: from the numbers that publishers give their messages. Free of ROS and of
clocks.

A publisher counts its messages up, so the numbers under which a joint arrives grow. They fall back
once when its driver restarts, and again and again when two publishers send the same joint. An arm's
driver and a gripper's have no joint in common, so neither disturbs the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LATE = 16  # messages by which one may be overtaken on the way; a restart falls back by more
MEMORY = 10.0  # how long a number that fell back counts [s]
OVERLAPS = 3  # numbers that fell back within `MEMORY`, from which on two publishers send the joint


@dataclass
class _Joint:
    number: int = 0  # of its newest message
    # when it fell back [s]
    fallen: deque[float] = field(default_factory=lambda: deque(maxlen=OVERLAPS))


class JointSources:
    """Follows the message numbers of the joints `wanted`.

    Attributes:
        numbered: Whether the middleware numbers messages; without numbers, only the joint sets tell
            publishers apart.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self.numbered = True
        self._wanted = frozenset(wanted)
        self._joints: dict[str, _Joint] = {}
        self._sets: dict[frozenset[str], float] = {}  # joint set -> when it came last [s]

    def take(self, names: Iterable[str], number: int | None, now: float) -> str:
        """Note a message that came at `now` [s], steady, with its publisher's `number` (None
        without).

        Returns the first joint whose publisher began anew; "" if none did.
        """
        own = self._wanted.intersection(names)
        if own:
            self._sets[own] = now
        self.numbered = number is not None
        restarted = ""
        if number is None:
            return restarted
        for name in sorted(own):
            joint = self._joints.setdefault(name, _Joint())
            if number <= joint.number:
                joint.fallen.append(now)
                if number < joint.number - LATE:
                    restarted = restarted or name
            joint.number = number
        return restarted

    def shared(self, publishers: int, now: float) -> list[str]:
        """Joints that two publishers send, if the topic has so many `publishers`."""
        if publishers < 2:
            return []
        if not self.numbered:
            recent = [names for names, came in self._sets.items() if now - came < MEMORY]
            disjoint = sum(map(len, recent)) == len(frozenset().union(*recent))
            return (
                [] if disjoint and len(recent) >= publishers else sorted(frozenset().union(*recent))
            )
        return [
            name
            for name, joint in sorted(self._joints.items())
            if len(joint.fallen) == OVERLAPS and now - joint.fallen[0] < MEMORY
        ]
