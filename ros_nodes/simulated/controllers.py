"""Controllers that turn commands into joint set-points on the simulated robot, modelled on those of
ros2_control and MoveIt Servo.

Every controller has ``setpoint(now)``: joint positions (J,) [rad] at a time, or None if its
commands have stopped and the arm must hold where it is. Free of ROS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ceed_vla.errors import SimulationError
from ceed_vla.kinematics import ArmKinematics, Array, turn_matrix


class ForwardPosition:
    """Sends positions (J,) [rad] to the joints until the time `until` [s], like a
    forward_command_controller.
    """

    def __init__(self, positions: Array, until: float) -> None:
        self._positions, self._until = positions, until

    def setpoint(self, now: float) -> Array | None:
        return self._positions if now < self._until else None


class Trajectory:
    """Follows way-points like a joint_trajectory_controller: cubic with velocities, linear without;
    it rests at the end.

    Args:
        start: Time to which `times` are relative [s].
        now: Time of arrival [s]; earlier way-points are dropped.
        joints, velocities: Set-point (J,) at `now` [rad], [rad/s].
        times: Times (P,) of the way-points after `start` [s].
        points, slopes: Way-points (P, J), finite [rad], [rad/s]; `slopes` is None for straight
            lines.

    `SimulationError`: A joint_trajectory_controller would reject the trajectory.
    """

    def __init__(
        self,
        start: float,
        now: float,
        joints: Array,
        velocities: Array,
        times: ArrayLike,
        points: Array,
        slopes: Array | None,
    ) -> None:
        offsets: Array = np.asarray(times, dtype=np.float64)
        if slopes is not None and np.abs(slopes[-1]).max() > 1e-6:
            raise SimulationError(
                f"The last way-point moves at {slopes[-1].tolist()} rad/s; it must rest (all 0)."
            )
        if not np.isfinite(offsets).all() or offsets[0] < 0.0 or np.any(np.diff(offsets) <= 0.0):
            raise SimulationError(
                f"Way-point times {offsets.tolist()} s; they must not be negative and must "
                "increase strictly."
            )
        ahead = start + offsets > now
        if not ahead.any():
            raise SimulationError(
                f"All way-points are past, the last by {now - start - offsets[-1]:.3f} s; "
                "stamp 0 starts a trajectory on arrival, with time_from_start > 0."
            )
        self._times = np.concatenate([[now], start + offsets[ahead]])
        self._points = np.vstack([joints, points[ahead]])
        self._slopes = None if slopes is None else np.vstack([velocities, slopes[ahead]])

    def setpoint(self, now: float) -> Array | None:
        return self.sample(now)[0]

    def sample(self, now: float) -> tuple[Array, Array]:
        """Return position (J,) [rad] and velocity (J,) [rad/s] at `now`; after the end, the last
        way-point's.
        """
        if now >= self._times[-1]:
            return self._points[-1], np.zeros_like(self._points[-1])
        index = max(int(np.searchsorted(self._times, now, side="right")) - 1, 0)
        span = self._times[index + 1] - self._times[index]
        s = float(np.clip((now - self._times[index]) / span, 0.0, 1.0))
        p0 = self._points[index]
        p1 = self._points[index + 1]
        if self._slopes is None:
            return p0 + s * (p1 - p0), (p1 - p0) / span
        m0 = span * self._slopes[index]
        m1 = span * self._slopes[index + 1]
        hermite = np.array(
            [2 * s**3 - 3 * s**2 + 1, 3 * s**2 - 2 * s**3, s**3 - 2 * s**2 + s, s**3 - s**2]
        )
        slope = np.array(
            [6 * s**2 - 6 * s, 6 * s - 6 * s**2, 3 * s**2 - 4 * s + 1, 3 * s**2 - 2 * s]
        )
        ends = np.stack([p0, p1, m0, m1])
        return hermite @ ends, slope @ ends / span


class ServoTwist:
    """Integrates a TCP twist in the base frame and solves for the joints, like MoveIt Servo, until
    twists stop.

    The first twist arrives at `now` [s]; `joints` (J,) is the initial set-point [rad].
    """

    def __init__(self, arm: ArmKinematics, now: float, joints: Array) -> None:
        self._arm = arm
        self._time = now
        self._joints = joints
        self._position, self._rotation = arm.pose(joints)
        self._linear: Array = np.zeros(3)
        self._angular: Array = np.zeros(3)
        self._until = now

    def command(self, linear: Array, angular: Array, until: float) -> None:
        """Continue with a twist (3,) [m/s], (3,) [rad/s] until it expires [s]."""
        self._linear = linear
        self._angular = angular
        self._until = until

    def setpoint(self, now: float) -> Array | None:
        if now >= self._until:
            return None
        span, self._time = max(now - self._time, 0.0), max(now, self._time)
        if span > 0.0:
            self._position = self._position + span * self._linear
            self._rotation = turn_matrix(span * self._angular) @ self._rotation
            self._joints = self._arm.solve(self._joints, self._position, self._rotation)
        return self._joints


Controller = ForwardPosition | Trajectory | ServoTwist


def finite(what: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return `values` as an array of `shape`.

    `SimulationError`: The shape differs, or a value is NaN or infinite.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except ValueError as error:
        raise SimulationError(f"The {what} are not an array of shape {shape}: {error}.") from error
    if array.shape != shape:
        raise SimulationError(f"The {what} have shape {array.shape}; it must be {shape}.")
    if not np.isfinite(array).all():
        raise SimulationError(f"The {what} {array.tolist()} are not finite.")
    return array
