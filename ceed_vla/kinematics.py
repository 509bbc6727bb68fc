"""Commanded pose of end-effector actions, and inverse kinematics, for simulated and real arms.

Orientations are rotation matrices (3, 3), or roll, pitch, yaw with ``Rz(yaw) Ry(pitch) Rx(roll)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Constant part [m^2] and share of the squared error: robust far from the target, fast near it.
_DAMPING = (1e-5, 0.2)
_POSTURE_GAIN = 0.1  # share of the way home per iteration, in the null space of the task
_MAX_STEP = 0.3  # of a joint per iteration [rad]
_REACHED = (1e-4, 5e-4)  # [m], [rad]
_FAR_OFF = 0.01  # remaining error above which another start is tried [m]
_UNWIND = 0.3  # of a joint per call on the way to another branch [rad]
_LIMIT_MARGIN = 0.02  # [rad]
# [m], [rad]: distance from the joint targets above which the commanded pose follows them.
_SLACK = (
    0.005,
    0.05,
)
_ROTATION_WEIGHT = 0.3  # [m/rad]: weight of one radian relative to one metre
_WEIGHTS = np.array([1.0] * 3 + [_ROTATION_WEIGHT] * 3)
NEXT, AFTER = [1, 2, 0], [2, 0, 1]  # cyclic successors of x, y, z, for cross products


def rotation(axis: int, angle: float) -> Array:
    """Rotation matrix (3, 3) about a coordinate axis (0 = x, 1 = y, 2 = z) by `angle` [rad]."""
    cosine = np.cos(angle)
    sine = np.sin(angle)
    i = (axis + 1) % 3
    j = (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[j, i], matrix[i, j] = sine, -sine
    return matrix


def turn_matrix(vector: Array) -> Array:
    """Rotation matrix (3, 3) of a rotation vector (3,) [rad] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)


def turn_vector(matrix: Array) -> Array:
    """Rotation vector (3,) [rad] of a rotation matrix: the inverse of `turn_matrix` below half a
    turn.
    """
    sine = 0.5 * (matrix[AFTER, NEXT] - matrix[NEXT, AFTER])
    size = float(np.linalg.norm(sine))
    cosine = 0.5 * (float(np.trace(matrix)) - 1.0)
    if size > 1e-6:
        return sine * (np.arctan2(size, cosine) / size)
    if cosine > 0.0:
        return sine
    axis = (matrix + np.eye(3))[:, np.argmax(np.diag(matrix))]  # half a turn; the sign is arbitrary
    return axis * (np.pi / np.linalg.norm(axis))


def rpy_matrix(rpy: Array) -> Array:
    """Rotation matrix (3, 3) of roll, pitch, yaw (3,) [rad]."""
    return rotation(2, rpy[2]) @ rotation(1, rpy[1]) @ rotation(0, rpy[0])


def matrix_rpy(matrix: Array) -> Array:
    """Roll, pitch, yaw (3,) [rad] of a rotation matrix.

    The inverse of `rpy_matrix` for |pitch| < pi/2.
    """
    pitch = np.arcsin(np.clip(-matrix[2, 0], -1.0, 1.0))
    return np.array(
        [np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])]
    )


def rotate_rpy(rpy: Array, delta: Array) -> Array:
    """Rotate `rpy` (3,) [rad] by a rotation vector (3,) in the base frame [rad]."""
    if float(np.linalg.norm(delta)) < 1e-9:
        return rpy.copy()
    return matrix_rpy(turn_matrix(delta) @ rpy_matrix(rpy))


@dataclass(frozen=True)
class PoseLimits:
    """Scales of end-effector actions, and limits of the commanded pose."""

    position_scale: float  # translation of a full action [m]
    rotation_scale: float  # rotation of a full action [rad]
    workspace_low: Array  # (3,) [m]
    workspace_high: Array  # (3,) [m]
    max_tilt: float  # largest commanded |roll| and |pitch|, less than pi/2 [rad]
    max_yaw: float  # largest commanded |yaw| [rad]

    def widened(self, pose: CommandedPose, within: PoseLimits | None = None) -> PoseLimits:
        """Return these limits, widened to include a commanded `pose` outside them.

        The pose may stay or come back inside; the limits are not widened beyond those `within`.
        """
        low = pose.position
        high = pose.position
        tilt = float(np.abs(pose.rpy[:2]).max())
        yaw = float(abs(pose.rpy[2]))
        if within is not None:
            low = np.maximum(low, within.workspace_low)
            high = np.minimum(high, within.workspace_high)
            tilt = min(tilt, within.max_tilt)
            yaw = min(yaw, within.max_yaw)
        return replace(
            self,
            workspace_low=np.minimum(self.workspace_low, low),
            workspace_high=np.maximum(self.workspace_high, high),
            max_tilt=max(self.max_tilt, tilt),
            max_yaw=max(self.max_yaw, yaw),
        )


class CommandedPose:
    """The TCP pose to which end-effector actions accumulate.

    At the start of a step, it is the target of the previous step.
    """

    def __init__(self, limits: PoseLimits, position: Array) -> None:
        self.limits = limits
        self.position = position  # (3,) [m]
        self.rpy: Array = np.zeros(3)  # roll, pitch, yaw [rad]

    @property
    def matrix(self) -> Array:
        """Orientation (3, 3)."""
        return rpy_matrix(self.rpy)

    def reset(self, position: Array, matrix: Array) -> None:
        """Start from the arm's current pose, (3,) [m] and (3, 3)."""
        self.position = np.array(position)
        self.rpy = matrix_rpy(matrix)

    def advance(self, action: Array) -> None:
        """Add an action (6,) in [-1, 1]: translation and rotation vector, in the base frame."""
        limits = self.limits
        moved = self.position + limits.position_scale * action[:3]
        self.position = np.clip(moved, limits.workspace_low, limits.workspace_high)
        bound = np.array([limits.max_tilt, limits.max_tilt, limits.max_yaw])
        turned = rotate_rpy(self.rpy, limits.rotation_scale * action[3:6])
        # Unwrap a yaw that has passed half a turn.
        if abs(over := turned[2] - self.rpy[2]) > np.pi:
            turned[2] -= np.copysign(2 * np.pi, over)
        self.rpy = np.clip(turned, -bound, bound)

    def follow(self, position: Array, matrix: Array) -> None:
        """Move to the pose of the joint targets if it differs, so that the command never departs
        from the arm.
        """
        rpy = matrix_rpy(matrix)
        if np.abs(position - self.position).max() > _SLACK[0]:
            self.position = np.array(position)
        if np.abs(rpy - self.rpy).max() > _SLACK[1]:
            self.rpy = rpy


class ArmKinematics(ABC):
    """An arm with J joints, and its inverse kinematics: damped least squares with a null-space pull
    to a home posture.

    Args:
        low: (J,) lower joint limits [rad].
        high: (J,) upper joint limits [rad].
        home: (J,) home posture [rad].
        max_joint_step: Largest motion of a joint per `solve` [rad].

    Attributes:
        lowest: (J,) lowest positions that `solve` returns [rad], a little above `low`.
        highest: (J,) highest ones [rad].
    """

    def __init__(
        self, low: Array, high: Array, home: Array, max_joint_step: float = np.inf
    ) -> None:
        self.low = low
        self.high = high
        self.home = home
        self._max_joint_step = max_joint_step
        margin = min(_LIMIT_MARGIN, 0.1 * float((high - low).min()))
        self.lowest = low + margin
        self.highest = high - margin

    @abstractmethod
    def pose(self, q: Array) -> tuple[Array, Array]:
        """TCP position (3,) [m] and orientation (3, 3) in the base frame at joints `q` (J,)
        [rad].
        """

    @abstractmethod
    def jacobian(self) -> tuple[Array, Array]:
        """Linear (3, J) and angular (3, J) Jacobian of the TCP at the joints of the last `pose`."""

    def solve(self, q: Array, position: Array, matrix: Array) -> Array:
        """Compute joints inside the limits that bring the TCP to a pose, or as near as possible.

        Args:
            q: (J,) joints to start from [rad]; start from the last commanded joints for continuous
                motion.
            position: (3,) target position [m].
            matrix: (3, 3) target orientation.

        Returns:
            (J,) [rad].
        """
        target, error = self._descend(q, position, matrix, 12)
        step = self._max_joint_step
        if error >= _FAR_OFF:
            # The joints are wound up against their limits: move towards the branch of the home
            # posture, by a small step per call.
            other, other_error = self._descend(self.home, position, matrix, 40)
            if other_error < 0.5 * error:
                target = other
                step = min(_UNWIND, step)
        return target if step == np.inf else q + np.clip(target - q, -step, step)

    def step(self, q: Array, moved: Array, posture: Array, low: Array, high: Array) -> Array:
        """Compute a small step of the joints that moves the TCP, or as nearly as possible.

        Args:
            q: (J,) joints at which the step begins [rad].
            moved: (6,) translation [m] and rotation vector [rad] of the TCP in the base frame.
            posture: (J,) step that is wanted where the TCP's motion leaves a choice [rad].
            low: (J,) lower bounds of the step [rad].
            high: (J,) upper bounds of the step [rad].

        Returns:
            (J,) [rad].
        """
        self.pose(q)
        jacobian = _WEIGHTS[:, None] * np.concatenate(self.jacobian())
        return _damped_step(_WEIGHTS * moved, jacobian, posture, low, high)

    def _descend(
        self, q: Array, position: Array, matrix: Array, iterations: int
    ) -> tuple[Array, float]:
        """Iterate until the error is within `_REACHED`.

        Returns:
            The joints (J,), and the size of the remaining error, 0 if it is within `_REACHED` [m].
        """
        q = np.array(q, dtype=np.float64)
        for _ in range(iterations):
            error = self._error(q, position, matrix)
            if (
                np.abs(error[:3]).max() < _REACHED[0]
                and np.abs(error[3:]).max() < _REACHED[1] * _ROTATION_WEIGHT
            ):
                return q, 0.0
            linear, angular = self.jacobian()
            q = q + self._bounded_step(
                q, error, np.concatenate([linear, _ROTATION_WEIGHT * angular])
            )
        return q, float(np.linalg.norm(self._error(q, position, matrix)))

    def _error(self, q: Array, position: Array, matrix: Array) -> Array:
        """Weighted error (6,) of the pose at `q`.

        Up to 2 rad, the rotation error is the sine of the angle, which is cheaper and as accurate.
        """
        tip, current = self.pose(q)
        relative = matrix @ current.T
        turn = 0.5 * (relative[NEXT, AFTER] - relative[AFTER, NEXT])
        if relative[0, 0] + relative[1, 1] + relative[2, 2] < 1.0 + 2.0 * np.cos(2.0):
            turn = -turn_vector(relative)
        return np.concatenate([position - tip, -_ROTATION_WEIGHT * turn])

    def _bounded_step(self, q: Array, error: Array, jacobian: Array) -> Array:
        """Damped least-squares step (J,) [rad] with a null-space pull, within the joint limits."""
        posture = _POSTURE_GAIN * (self.home - q)
        return _damped_step(error, jacobian, posture, self.lowest - q, self.highest - q)


def _damped_step(error: Array, jacobian: Array, posture: Array, low: Array, high: Array) -> Array:
    """Damped least-squares step (J,) [rad] towards a weighted `error` (6,), between bounds (J,)."""
    held = np.zeros(len(posture), dtype=bool)
    step = np.zeros(len(posture))
    for _ in range(len(posture)):
        free = ~held
        if not free.any():
            break
        part = jacobian[:, free]
        remaining = error - jacobian[:, held] @ step[held]
        regular = part @ part.T + (_DAMPING[0] + _DAMPING[1] * error @ error) * np.eye(len(error))
        step[free] = posture[free] + part.T @ np.linalg.solve(
            regular, remaining - part @ posture[free]
        )
        size = np.abs(step[free]).max()
        if size > _MAX_STEP:
            step[free] *= _MAX_STEP / size
        outside = free & ((step < low) | (step > high))
        if not outside.any():
            break
        held |= outside
        step[outside] = np.clip(step[outside], low[outside], high[outside])
    return np.clip(step, low, high)
