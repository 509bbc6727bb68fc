"""The newest value and stamp of every joint: an arm's driver and a gripper's may publish messages
of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sensor_msgs.msg import JointState

from ceed_vla.ros_nodes.robot.messages import seconds
from ceed_vla.ros_nodes.robot.texts import short

_FIELDS = ("position", "velocity", "effort")


@dataclass
class JointTable:
    """Merges joint states that each have some of the joints `wanted`."""

    wanted: Sequence[str]
    lacks: str = ""  # what the newest message lacked, though one before had it; "" if nothing
    # joint -> its newest message, and where
    _rows: dict[str, tuple[JointState, int]] = field(default_factory=dict)

    def forget(self) -> None:
        self._rows.clear()
        self.lacks = ""

    def take(self, message: JointState) -> tuple[JointState, list[float]]:
        """The joints that are known now, and the stamp of each [s]; the message's own is the
        oldest.

        A message that contradicts itself, or has none of the joints while none are known, comes
        back as it is.
        """
        names = list(message.name)
        places = {name: names.index(name) for name in self.wanted if name in names}
        broken = any(names.count(name) > 1 for name in places) or any(
            len(getattr(message, field)) not in (len(names), 0) for field in _FIELDS
        )
        if broken or len(message.position) != len(names) or not (places or self._rows):
            return message, [seconds(message.header.stamp)] * len(names)
        self._rows |= {name: (message, place) for name, place in places.items()}
        missing = [name for name in self.wanted if name not in places and name in self._rows]
        has = short(", ".join(names), 100) or "no joints"
        self.lacks = f"The joint state lacks {', '.join(missing)}; it has {has}." if missing else ""
        if len(places) == len(self._rows):  # all from this message, the usual case
            return message, [seconds(message.header.stamp)] * len(names)
        merged = JointState(name=list(self._rows))
        rows = list(self._rows.values())
        for values in _FIELDS:
            given = [getattr(row, values) for row, _ in rows]
            if any(given):  # a gripper's driver may tell positions alone
                found = zip(given, rows, strict=True)
                setattr(
                    merged,
                    values,
                    [values[place] if values else math.nan for values, (_, place) in found],
                )
        stamps = [seconds(row.header.stamp) for row, _ in rows]
        merged.header.stamp = rows[stamps.index(min(stamps))][0].header.stamp
        return merged, stamps
