"""Whether joint states are whole, and can be true: a broken sensor, swapped names or another unit do what no arm does.

An arm that is commanded from such a state moves at its limit, so `SafetyFilter` holds until somebody looks. No ROS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ceed_vla.errors import ObservationError
from ceed_vla.kinematics import Array
from ros_nodes.robot.texts import short

PHYSICAL_VELOCITY = float(np.pi)  # of a joint whose own limit is not known [rad/s]
_SPEEDS = 2.0  # physical velocities that are believed
_SLACK = 0.05  # noise, and stamps that jitter [rad]
_OUTSIDE = 0.1  # beyond the position limits [rad]


def by_name(have: Sequence[str], values: Sequence[float], names: Sequence[str], what: str) -> Array:
    """The `values` of `names` (J,) among those that a joint state has, in any order; errors call them `what`.

    `ObservationError`: Joints missing or named twice, another number of values than of names, values not finite.
    """
    if len(values) != len(have):
        raise ObservationError(f"The joint state has {len(have)} names and {len(values)} {what}.")
    if len(set(have)) != len(have):
        raise ObservationError(f"The joint state names a joint twice: {short(', '.join(have))}.")
    table = dict(zip(have, values, strict=True))
    missing = [name for name in names if name not in table]
    if missing:
        raise ObservationError(
            f"The joint state lacks {', '.join(missing)}; it has {short(', '.join(have)) or 'no joints'}."
        )
    chosen = np.array([table[name] for name in names], dtype=np.float64)
    if not np.isfinite(chosen).all():
        bad = [f"{name} {value}" for name, value in zip(names, chosen, strict=True) if not np.isfinite(value)]
        raise ObservationError(f"The joint state's {what} are not finite: {', '.join(bad)}.")
    return chosen


class Plausibility:
    """Compares joint states (J,) [rad] with the limits, and each with the one before it by the velocity [rad/s]."""

    def __init__(self, names: Sequence[str], low: Array, high: Array, velocity: Array) -> None:
        self._names, self._low, self._high, self._velocity = tuple(names), low, high, velocity
        self._last: tuple[Array, Array | None] | None = None

    def outside(self, positions: Array) -> str:
        """Which joint of a state (J,) [rad] lies where none can be; "" if none does."""
        beyond = np.maximum(self._low - positions, positions - self._high)
        joint = int(beyond.argmax())
        if beyond[joint] <= _OUTSIDE:
            return ""
        where = f"{self._names[joint]} is at {positions[joint]:.6g} rad, {beyond[joint]:.3g} outside its limits"
        return f"{where} [{self._low[joint]:.4g}, {self._high[joint]:.4g}]"

    def jump(self, positions: Array, stamps: Array | None) -> str:
        """Which joint of a state (J,) [rad] moved faster than it can since the last call; "" if none did.

        The order of the stamps (J,) [s] does not matter: a late message is a state of a moment ago, and after a jump of
        the clock the time between two states is long. Without stamps nothing is compared.
        """
        before, self._last = self._last, (positions, stamps)
        if before is None or before[1] is None or stamps is None:
            return ""
        seconds = np.abs(stamps - before[1])
        excess = np.abs(positions - before[0]) - (_SPEEDS * self._velocity * seconds + _SLACK)
        joint = int(excess.argmax())
        if excess[joint] <= 0.0:
            return ""
        way = f"from {before[0][joint]:.4g} to {positions[joint]:.4g} rad in {seconds[joint]:.3f} s"
        return f"{self._names[joint]} went {way}; it moves at most {self._velocity[joint]:.3g} rad/s"
