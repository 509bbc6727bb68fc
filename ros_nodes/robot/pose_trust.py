"""Decides which joint states are trusted as the arm's pose. Free of ROS and of clocks; `safety.py`
states the rule.

A pose is trusted once the joint states have agreed with each other for `TRUST_TIME`. From then on,
every state that follows without a gap is trusted too. A gap, a jump or a position outside the
limits ends the trust, and the states must agree again. The last trusted pose is remembered over the
gap: a new pose that differs from it is not trusted until an operator accepts it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ceed_vla.errors import ObservationError
from ceed_vla.kinematics import Array
from ceed_vla.texts import short

TRUST_TIME = 0.2  # time for which joint states must agree before their pose is trusted [s]
TRUST_STATES = 3  # smallest number of states that must agree
PHYSICAL_VELOCITY = float(np.pi)  # of a joint whose own limit is unknown [rad/s]
_SPEEDS = 2.0  # largest velocity between two states, as a multiple of the physical velocity
_SLACK = 0.05  # tolerance for noise and for jitter of the stamps [rad]
_OUTSIDE = 0.1  # largest distance of a joint beyond its position limits [rad]
_EXACT = 1e-9  # rounding error of a position [rad]
_MOMENT = 1e-4  # rounding error of the difference of two stamps, which are large numbers [s]


@dataclass(frozen=True)
class JointBounds:
    """Bounds that joint states are compared with; every array is (J,)."""

    names: tuple[str, ...]
    low: Array  # [rad]
    high: Array  # [rad]
    velocity: Array  # largest physical velocity [rad/s]
    step: Array  # `limits.step`: largest distance of a pose from the last trusted one [rad]
    longest_gap: float  # between two consecutive states [s]


def by_name(have: Sequence[str], values: Sequence[float], names: Sequence[str], what: str) -> Array:
    """Select the `values` of `names` (J,) from a joint state, which may have any order.

    Errors call the values `what`. `ObservationError`: Joints are missing or named twice, the
    numbers of names and values differ, or values are not finite.
    """
    if len(values) != len(have):
        raise ObservationError(f"The joint state has {len(have)} names and {len(values)} {what}.")
    if len(set(have)) != len(have):
        raise ObservationError(f"The joint state names a joint twice: {short(', '.join(have))}.")
    table = dict(zip(have, values, strict=True))
    missing = [name for name in names if name not in table]
    if missing:
        has = short(", ".join(have)) or "no joints"
        raise ObservationError(f"The joint state lacks {', '.join(missing)}; it has {has}.")
    chosen = np.array([table[name] for name in names], dtype=np.float64)
    if not np.isfinite(chosen).all():
        every = zip(names, chosen, strict=True)
        bad = [f"{name} {value}" for name, value in every if not np.isfinite(value)]
        raise ObservationError(f"The joint state's {what} are not finite: {', '.join(bad)}.")
    return chosen


class PoseTrust:
    """Takes every joint state in turn and determines the trusted pose.

    Attributes:
        pose: The last trusted pose (J,) [rad]; None before the first one.
        newest: The last state (J,) [rad], trusted or not; None before the first one.
        trusted: Whether `newest` is trusted.
    """

    def __init__(self, bounds: JointBounds) -> None:
        self.pose: Array | None = None
        self.newest: Array | None = None
        self.trusted = False
        self._bounds = bounds
        self._stamps: Array | None = None  # (J,) of `newest` [s]
        self._slack = np.minimum(_SLACK, 0.5 * bounds.step)  # (J,) [rad]
        # The states of the last `TRUST_TIME`: stamp [s], and the lowest and highest positions (J,)
        # at that stamp.
        self._agreeing: deque[tuple[float, Array, Array]] = deque()

    def take(self, positions: Array, stamps: Array) -> tuple[str, str]:
        """Take a state (J,) [rad] and the stamp of each of its joints (J,) [s].

        Returns:
            Which joint is at an impossible position, and which joint jumped out of a trusted pose;
            "" for each if none did.
        """
        outside = self._outside(positions)
        jump = self._jump(positions, stamps)
        gap = self._gap(stamps)
        was_trusted = self.trusted
        if outside or jump or gap:
            self._agreeing.clear()
            self.trusted = False
        self.newest = positions
        self._stamps = stamps
        if not outside:
            self._remember(positions, float(stamps.min()))
            self._judge(positions)
        return outside, jump if was_trusted else ""

    @property
    def settled(self) -> bool:
        """Whether the states of the last `TRUST_TIME` agree, so that motion may start from
        `newest`.
        """
        if len(self._agreeing) < TRUST_STATES:
            return False
        if self._agreeing[-1][0] - self._agreeing[0][0] < TRUST_TIME - _MOMENT:
            return False
        return bool((self._spread() <= self._bounds.step).all())

    @property
    def elsewhere(self) -> str:
        """Which joint settled too far from the last trusted pose; "" if none did."""
        if self.pose is None or self.newest is None or self.trusted or not self.settled:
            return ""
        way = np.abs(self.newest - self.pose) - self._bounds.step
        joint = int(way.argmax())
        if way[joint] <= _EXACT:
            return ""
        return (
            f"{self._bounds.names[joint]} is at {self.newest[joint]:.4g} rad, the last trusted "
            f"pose has it at {self.pose[joint]:.4g}, further than limits.step "
            f"({self._bounds.step[joint]:.3g})"
        )

    @property
    def unsettled(self) -> str:
        """Why the states are not trusted yet, for the operator."""
        span = self._agreeing[-1][0] - self._agreeing[0][0] if self._agreeing else 0.0
        spread = self._spread() - self._bounds.step if self._agreeing else -self._bounds.step
        joint = int(spread.argmax())
        if spread[joint] > 0.0:
            return (
                f"{self._bounds.names[joint]} moves too fast to start: further than limits.step "
                f"({self._bounds.step[joint]:.3g} rad) within {TRUST_TIME:g} s"
            )
        return (
            f"the joint states agree for {span:.2f} s ({len(self._agreeing)} states); motion "
            f"starts after {TRUST_TIME:g} s and {TRUST_STATES} states within limits.step of each "
            "other"
        )

    def accept(self) -> None:
        """Forget the last trusted pose, so that the next settled pose is trusted anywhere."""
        if self.trusted:
            return
        self.pose = None
        if self.newest is not None and self._agreeing:
            self._judge(self.newest)

    def _spread(self) -> Array:
        """Return the largest distance between the states of the last `TRUST_TIME` (J,) [rad]."""
        lowest = np.min([low for _, low, _ in self._agreeing], axis=0)
        highest = np.max([high for _, _, high in self._agreeing], axis=0)
        spread: Array = highest - lowest
        return spread

    def _remember(self, positions: Array, stamp: float) -> None:
        """Store a state; drop older ones that `TRUST_TIME` no longer needs."""
        states = self._agreeing
        # from another joint's driver, or late: no time has passed
        if states and stamp <= states[-1][0]:
            last, low, high = states[-1]
            states[-1] = (last, np.minimum(low, positions), np.maximum(high, positions))
            return
        states.append((stamp, positions, positions))
        while len(states) > TRUST_STATES and stamp - states[1][0] >= TRUST_TIME:
            states.popleft()

    def _judge(self, positions: Array) -> None:
        """Determine whether `positions`, the newest state, are trusted."""
        near = self.pose is None or bool(
            (np.abs(positions - self.pose) <= self._bounds.step + _EXACT).all()
        )
        self.trusted = near and (self.trusted or self.settled)
        if self.trusted:
            self.pose = positions

    def _outside(self, positions: Array) -> str:
        bounds = self._bounds
        beyond = np.maximum(bounds.low - positions, positions - bounds.high)
        # otherwise the first command would be a larger step
        excess = beyond - np.minimum(_OUTSIDE, bounds.step)
        joint = int(excess.argmax())
        if excess[joint] <= _EXACT:
            return ""
        return (
            f"{bounds.names[joint]} is at {positions[joint]:.6g} rad, {beyond[joint]:.3g} outside "
            f"its limits [{bounds.low[joint]:.4g}, {bounds.high[joint]:.4g}]"
        )

    def _jump(self, positions: Array, stamps: Array) -> str:
        """Return which joint moved faster than possible since the last state; "" if none did.

        The order of the stamps does not matter: a late message is an earlier state.
        """
        if self.newest is None or self._stamps is None:
            return ""
        bounds = self._bounds
        seconds = np.abs(stamps - self._stamps)
        reach = _SPEEDS * bounds.velocity * np.minimum(seconds, bounds.longest_gap) + self._slack
        excess = np.abs(positions - self.newest) - reach
        joint = int(excess.argmax())
        if excess[joint] <= 0.0 or seconds[joint] > bounds.longest_gap:  # the latter is a gap
            return ""
        way = (
            f"from {self.newest[joint]:.4g} to {positions[joint]:.4g} rad in {seconds[joint]:.3f} s"
        )
        return (
            f"{bounds.names[joint]} went {way}; it moves at most {bounds.velocity[joint]:.3g} rad/s"
        )

    def _gap(self, stamps: Array) -> bool:
        """Whether the states of a joint were missing for too long, or the clock went back."""
        if self._stamps is None:
            return False
        return bool((np.abs(stamps - self._stamps) > self._bounds.longest_gap + _MOMENT).any())
