"""Detects two publishers of one joint from the numbers of their messages.

A publisher numbers its messages in ascending order, so the numbers of a joint's messages grow. They
fall back once when its driver restarts, and repeatedly when two publishers send the same joint. The
drivers of an arm and of a gripper share no joint, so neither disturbs the other. Free of ROS and of
clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LATE = 16  # largest fall of a number by reordering on the way; a restart falls back by more
MEMORY = 10.0  # time for which a fall of a number counts [s]
OVERLAPS = 3  # falls within `MEMORY` from which on two publishers are assumed


@dataclass
class _Joint:
    number: int = 0  # of its newest message
    # times at which the number fell back [s]
    fallen: deque[float] = field(default_factory=lambda: deque(maxlen=OVERLAPS))


class JointSources:
    """Follows the message numbers of the joints `wanted`.

    Attributes:
        numbered: Whether the middleware numbers messages; if not, publishers are told apart only by
            their joint sets.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self.numbered = True
        self._wanted = frozenset(wanted)
        self._joints: dict[str, _Joint] = {}
        # topic and joint set -> time of its last message [s]
        self._sets: dict[tuple[str, frozenset[str]], float] = {}

    def take(self, names: Iterable[str], number: int | None, now: float, topic: str = "") -> str:
        """Record a message that arrived on `topic` at steady time `now` [s].

        `number` is its publisher's number for it, None without one. Returns the first joint whose
        publisher restarted its numbers; "" if none did.
        """
        own = self._wanted.intersection(names)
        if own:
            self._sets[topic, own] = now
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

    def shared(self, publishers: int, now: float, topic: str = "") -> list[str]:
        """Return the joints that two publishers send, if `topic` has `publishers` publishers."""
        if publishers < 2:
            return []
        if not self.numbered:
            recent = [
                names
                for (where, names), came in self._sets.items()
                if where == topic and now - came < MEMORY
            ]
            disjoint = sum(map(len, recent)) == len(frozenset().union(*recent))
            return (
                [] if disjoint and len(recent) >= publishers else sorted(frozenset().union(*recent))
            )
        return [
            name
            for name, joint in sorted(self._joints.items())
            if len(joint.fallen) == OVERLAPS and now - joint.fallen[0] < MEMORY
        ]
