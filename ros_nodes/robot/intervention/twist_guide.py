"""Commands from the tool velocities that a person wants. Free of ROS and of clocks.

With an acceleration limit, speed builds up and decays by the same share in all joints, so that the
tool stays on its line, and early enough to stop at the limits of the commanded pose.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ceed_vla.kinematics import (
    ArmKinematics,
    Array,
    CommandedPose,
    PoseLimits,
    rotate_rpy,
    rpy_matrix,
    turn_vector,
)
from ceed_vla.ros_nodes.robot.intervention.base import Wish

_ANYWHERE = 1e3  # limits of the commanded pose without a workspace [m, rad]
_SAME = 1e-6  # difference of two commands that is rounding [rad]
_SPEED_SHARE = 0.9  # of the velocity limits that the tool's motion uses
_STOP_TIME = 0.3  # within which it could stop [s]
_RAMP_SHARE = 0.7  # of the acceleration limits that a changed wish uses; curved paths need the rest
_EDGE_SHARE = 0.4  # and a stop at the edge of the workspace
_CORRECTED = 10.0  # rate at which the tool returns to its line [1/s]
_POSTURE = 1.0  # rate at which joints that are free to move return to the home posture [1/s]
_TINY = 1e-12
_FAST = 1e6  # [rad/s^2], an acceleration without a limit


class TwistGuide:
    """Moves the TCP by the person's velocities, within the robot's workspace.

    Args:
        model: The arm's kinematics.
        limits: Of the commanded pose; None: only the joints are limited.
        max_velocity: Of the joints (J,) [rad/s].
        max_acceleration: Of the joints (J,) [rad/s^2]; None without a limit.
    """

    def __init__(
        self,
        model: ArmKinematics,
        limits: PoseLimits | None,
        max_velocity: Array,
        max_acceleration: Array | None,
    ) -> None:
        self._model = model
        far = _ANYWHERE * np.ones(3)
        anywhere = PoseLimits(1.0, 1.0, -far, far, _ANYWHERE, _ANYWHERE)
        self._limits = replace(limits or anywhere, position_scale=1.0, rotation_scale=1.0)
        self._fastest = _SPEED_SHARE * max_velocity
        if max_acceleration is not None:
            self._fastest = np.minimum(self._fastest, _STOP_TIME * max_acceleration)
        fast = np.full(len(max_velocity), _FAST)
        self._brake = fast if max_acceleration is None else max_acceleration
        self._pose = CommandedPose(self._limits, np.zeros(3))  # the line that the tool follows
        self._twist: Array = np.zeros(6)  # of that pose [m/s, rad/s]
        self._velocity: Array = np.zeros(len(max_velocity))  # of the joints (J,) [rad/s]
        self._expected: Array | None = None  # (J,) [rad], what the filter should let through
        self._before: tuple[Array, float] | None = None  # previous `last` and `dt`
        self.grip_tolerance = np.inf  # buttons say what the person wants

    def begin(self, last: Array) -> None:
        self._pose.reset(*self._model.pose(last))
        self._pose.limits = self._limits.widened(self._pose)
        self._twist = np.zeros(6)
        self._velocity = np.zeros(len(last))
        self._expected = last
        self._before = None

    def misaligned(self, wish: Wish, last: Array) -> str:
        return ""

    def command(self, wish: Wish, last: Array, dt: float) -> Array:
        assert wish.twist is not None
        if not dt > 0.0:  # the filter holds
            return last
        if self._expected is None:
            self.begin(last)
        elif np.abs(self._expected - last).max() > _SAME:
            self._continue(last)
        tip, matrix = self._model.pose(last)
        self._twist = self._next_twist(last, wish.twist, dt)
        wanted: Array = np.zeros(len(last))
        if self._twist.any():
            line = self._twist * dt
            self._pose.advance(line)
            turn = turn_vector(self._pose.matrix @ matrix.T)
            beside = np.concatenate([self._pose.position - tip, turn]) - line
            moved = line + _CORRECTED * dt * beside
            posture = _POSTURE * dt * (self._model.home - last)
            wanted = self._step(last, moved, posture, dt) / dt
            wanted = wanted * common_share(wanted, self._fastest / _SPEED_SHARE)
        share = largest_share(wanted, self._velocity, self._brake * dt)
        if share is None:  # the joints cannot turn to the line in time: stop
            share = 1.0 - common_share(self._velocity, self._brake * dt)
            wanted = self._velocity
        self._velocity = share * wanted
        self._twist = share * self._twist
        self._expected = last + self._velocity * dt
        self._pose.follow(*self._model.pose(self._expected))
        self._before = last, dt
        # The filter brakes for the requested command: with its braking distance it need not.
        return self._expected + self._velocity * np.abs(self._velocity) / (2.0 * self._brake)

    def _continue(self, last: Array) -> None:
        """Continue from another command than was requested, for example because the arm is blocked:
        the pose would run ahead of the arm.
        """
        velocity: Array = np.zeros(len(last))
        if self._before is not None:
            before, dt = self._before
            velocity = (last - before) / dt
        self._pose.reset(*self._model.pose(last))
        self._pose.limits = self._limits.widened(self._pose, self._pose.limits)
        self._twist = np.concatenate(self._model.jacobian()) @ velocity
        self._velocity = velocity

    def _next_twist(self, last: Array, wish: Array, dt: float) -> Array:
        """Return the twist (6,) nearest to the wish (6,) that the joints' limits allow."""
        wish = wish * common_share(self._rates(last, wish, dt), self._fastest)
        wish = self._before_the_limits(last, wish, dt)
        change = wish - self._twist
        faster = self._rates(last, change, dt)
        return self._twist + change * common_share(faster, _RAMP_SHARE * self._brake * dt)

    def _before_the_limits(self, last: Array, twist: Array, dt: float) -> Array:
        """Slow a twist (6,) down where it would not stop within the limits of the pose."""
        limits = self._pose.limits
        pose = np.concatenate([self._pose.position, self._pose.rpy])
        turned = rotate_rpy(self._pose.rpy, twist[3:] * dt) - self._pose.rpy
        rates = np.concatenate([twist[:3], turned / dt])
        bound = np.array([limits.max_tilt, limits.max_tilt, limits.max_yaw])
        low = np.concatenate([limits.workspace_low, -bound])
        high = np.concatenate([limits.workspace_high, bound])
        room = np.where(rates > 0.0, high - pose, pose - low)
        time = np.max(np.abs(self._rates(last, twist, dt)) / (_EDGE_SHARE * self._brake))
        brake = np.abs(rates) / max(float(time), _TINY)
        fastest = stoppable(room, brake, dt)
        slower = np.clip(rates, -fastest, fastest)
        if np.array_equal(slower[3:], rates[3:]):
            return np.concatenate([slower[:3], twist[3:]])
        end = rpy_matrix(self._pose.rpy + slower[3:] * dt)
        return np.concatenate([slower[:3], turn_vector(end @ self._pose.matrix.T) / dt])

    def _rates(self, last: Array, twist: Array, dt: float) -> Array:
        """Return the velocities (J,) [rad/s] of the joints at a twist (6,) of the TCP."""
        return self._step(last, twist * dt, np.zeros(len(last)), dt) / dt

    def _step(self, last: Array, moved: Array, posture: Array, dt: float) -> Array:
        """Return the step (J,) [rad] for a small motion (6,) of the TCP, before which the joints
        can stop at their limits.
        """
        down = stoppable(last - self._model.lowest, self._brake, dt) * dt
        up = stoppable(self._model.highest - last, self._brake, dt) * dt
        return self._model.step(last, moved, posture, -down, up)


def stoppable(room: Array, brake: Array, dt: float) -> Array:
    """Return the largest speeds (N,) after which a braking motion stops within the `room` (N,).

    Args:
        room: Distance to the limit.
        brake: Acceleration (N,).
        dt: Time until the next command [s].
    """
    room = np.maximum(room, 0.0)
    gain = brake * dt
    return np.minimum(np.sqrt(gain**2 + 2.0 * gain * room / dt) - gain, room / dt)


def common_share(wanted: Array, allowed: Array) -> float:
    """Return the largest share, at most 1, of `wanted` (N,) that is `allowed` (N,) in size."""
    return min(1.0, float(np.min(allowed / np.maximum(np.abs(wanted), _TINY))))


def largest_share(wanted: Array, velocity: Array, change: Array) -> float | None:
    """Return the largest share, at most 1, of the `wanted` velocity (N,) that is within a `change`
    (N,) of the present `velocity` (N,); None if none is.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([velocity - change, velocity + change]) / wanted
    still = wanted == 0.0
    if np.any(np.abs(velocity[still]) > change[still]):
        return None
    low = max(0.0, float(ends.min(0)[~still].max(initial=0.0)))
    high = min(1.0, float(ends.max(0)[~still].min(initial=1.0)))
    return high if low <= high else None
