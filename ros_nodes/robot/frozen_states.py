"""Detects a driver that repeats its last joint state while the commands move on."""

from __future__ import annotations

import numpy as np

from ceed_vla.kinematics import Array

# Joint states that do not change for this time [s], while commands move this far [rad], are stale.
FROZEN_TIME = 0.5
FROZEN_WAY = 0.05


class FrozenStates:
    """Compares every joint state with the previous one and with the commands in between."""

    def __init__(self) -> None:
        self._positions: Array | None = None  # (J,) of the newest state [rad]
        self._since = 0.0  # time from which they were equal although commands moved [s]
        self._command: Array | None = None  # (J,) at that time [rad]

    def forget(self) -> None:
        """Start again with the next state."""
        self._positions = None

    def take(
        self,
        measured: Array,
        stamp: float,
        command: Array | None,
        *,
        max_step: Array,
        follows: bool,
    ) -> str:
        """Take a joint state.

        Args:
            measured: Positions (J,) [rad].
            stamp: Time of the measurement [s].
            command: The last command (J,) [rad]; None before the first one.
            max_step: `limits.step` (J,) [rad].
            follows: Whether commands reach the arm.

        Returns:
            How the positions repeat while the command moves on; "" if they do not.
        """
        if (
            self._positions is None
            or self._command is None
            or stamp < self._since
            or not np.array_equal(measured, self._positions)
        ):
            self._positions = measured
            self._since = stamp
            self._command = command
            return ""
        way = 0.0 if command is None else float(np.abs(command - self._command).max())
        seconds = stamp - self._since
        # The arm is at rest: its time to follow begins with the command that moves it.
        if way < 0.1 * FROZEN_WAY:
            self._since = stamp
        if not follows or seconds <= FROZEN_TIME:
            return ""
        # No command is further than `limits.step` from the pose, so half of that must suffice.
        if way <= min(FROZEN_WAY, 0.5 * float(max_step.min())):
            return ""
        return (
            f"the joint states are the same for {seconds:.2f} s, while the command moved "
            f"{way:.3f} rad"
        )
