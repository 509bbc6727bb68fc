"""The newest value and stamp of every joint, because the drivers of an arm and of a gripper may
publish separate messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sensor_msgs.msg import JointState

from ceed_vla.ros_nodes.robot.messages import seconds
from ceed_vla.texts import short

_FIELDS = ("position", "velocity", "effort")


@dataclass
class JointTable:
    """Merges joint states that each contain some of the joints `wanted`."""

    wanted: Sequence[str]
    lacks: str = ""  # joints that earlier messages had and the newest lacks; "" if none
    # joint -> its newest message, and its index there
    _rows: dict[str, tuple[JointState, int]] = field(default_factory=dict)

    def forget(self) -> None:
        self._rows.clear()
        self.lacks = ""

    def take(self, message: JointState) -> tuple[JointState, list[float]]:
        """Return a message with all joints known so far, and the stamp of each joint [s].

        The message's own stamp is the oldest of them. A message that contradicts itself is returned
        unchanged, and so is a message without known joints if no joint is known yet.
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
            columns = [getattr(row, values) for row, _ in rows]
            if any(columns):  # a gripper's driver may send only positions
                found = zip(columns, rows, strict=True)
                setattr(
                    merged,
                    values,
                    [values[place] if values else math.nan for values, (_, place) in found],
                )
        stamps = [seconds(row.header.stamp) for row, _ in rows]
        merged.header.stamp = rows[stamps.index(min(stamps))][0].header.stamp
        return merged, stamps
