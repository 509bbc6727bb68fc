"""Kinematics of the 7-joint arm: Denavit-Hartenberg table, joint limits, forward kinematics, inverse kinematics.

The figures are the public ones of the Franka Emika Panda (modified / Craig convention). The tool centre point (TCP)
frame has x forward, y to the left and z up when the gripper points straight down, so its orientation is the identity
there and the sign of its quaternion never flips in normal use.
"""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# a [m], d [m], alpha [rad] of joints 1..7.
DH = (
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
)
FLANGE_OFFSET = 0.107  # joint 7 frame to flange, along z [m]
HAND_YAW = -np.pi / 4  # hand about the flange's z [rad]
TCP_OFFSET = 0.12  # flange to TCP, along z [m]
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # [rad]
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])  # [rad]
HOME = np.array([0.0, -0.60, 0.0, -2.55, 0.0, 1.95, np.pi / 4])  # gripper down, fingers open along y [rad]

_DAMPING = (
    1e-5,
    0.2,
)  # constant part [m^2] and share of the squared error: robust far away, quick at the end
_POSTURE_GAIN = 0.1
_MAX_STEP = 0.3  # of a joint per iteration [rad]
_FAR_OFF = 0.01  # remaining error from which another start is tried [m]
_UNWIND = 0.3  # of a joint per call on the way to another branch [rad]
_LIMIT_MARGIN = 0.02  # [rad]
_NEXT, _AFTER = [1, 2, 0], [2, 0, 1]  # cyclic successors of x, y, z, for cross products
_ROTATION_WEIGHT = 0.3  # [m/rad]: how much one radian counts against one metre


def rotation(axis: int, angle: float) -> Array:
    """Rotation matrix (3, 3) about a coordinate axis (0 = x, 1 = y, 2 = z) by `angle` [rad]."""
    cosine, sine = np.cos(angle), np.sin(angle)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[j, i], matrix[i, j] = sine, -sine
    return matrix


def rpy_matrix(rpy: Array) -> Array:
    """Rotation matrix (3, 3) of roll, pitch, yaw [rad]: ``Rz(yaw) Ry(pitch) Rx(roll)``."""
    return rotation(2, rpy[2]) @ rotation(1, rpy[1]) @ rotation(0, rpy[0])


def matrix_rpy(matrix: Array) -> Array:
    """Roll, pitch, yaw (3,) [rad] of a rotation matrix; the inverse of `rpy_matrix` for |pitch| < pi/2."""
    pitch = np.arcsin(np.clip(-matrix[2, 0], -1.0, 1.0))
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])


def rotate_rpy(rpy: Array, delta: Array) -> Array:
    """Turn an orientation by a rotation vector in the base frame.

    Args:
        rpy: Roll, pitch, yaw (3,) [rad].
        delta: Rotation vector in the base frame (3,) [rad].

    Returns:
        Roll, pitch, yaw (3,) of the turned orientation [rad].
    """
    angle = float(np.linalg.norm(delta))
    if angle < 1e-9:
        return rpy.copy()
    x, y, z = delta / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)
    return matrix_rpy(turn @ rpy_matrix(rpy))


def forward_kinematics(q: Array) -> tuple[Array, Array]:
    """TCP pose of joint angles, by the Denavit-Hartenberg table (independent of MuJoCo).

    Args:
        q: Joint angles (7,) [rad].

    Returns:
        Position (3,) [m] and rotation matrix (3, 3) of the TCP in the base frame.
    """
    position, frame = np.zeros(3), np.eye(3)
    for (a, d, alpha), angle in zip(DH, q, strict=True):
        position = position + frame @ np.array([a, -d * np.sin(alpha), d * np.cos(alpha)])
        frame = frame @ rotation(0, alpha) @ rotation(2, angle)
    position = position + frame @ np.array([0.0, 0.0, FLANGE_OFFSET + TCP_OFFSET])
    return position, frame @ rotation(2, HAND_YAW) @ rotation(0, np.pi)


class InverseKinematics:
    """Damped least squares on the arm of a compiled scene, with a null-space pull to the home posture.

    Args:
        model: Scene whose first seven joints are the arm's.
        tcp_site: Id of the TCP site.
    """

    def __init__(self, model: mujoco.MjModel, tcp_site: int) -> None:
        self._model = model
        self._data = mujoco.MjData(model)  # scratch: the caller's state is never touched
        self._site = tcp_site

    def solve(self, q: Array, position: Array, matrix: Array) -> Array:
        """Joint angles that bring the TCP to a pose, or as near as the limits allow.

        Args:
            q: Joint angles to start from (7,) [rad]; the last commanded ones keep the motion continuous.
            position: Wanted TCP position (3,) [m].
            matrix: Wanted TCP rotation matrix (3, 3).

        Returns:
            Joint angles (7,) inside the limits [rad].
        """
        solution, error = self._descend(q, position, matrix, 12)
        if error < _FAR_OFF:
            return solution
        # Wound up against joint limits: go back towards the branch of the home posture, a little per call.
        other, other_error = self._descend(HOME, position, matrix, 40)
        return q + np.clip(other - q, -_UNWIND, _UNWIND) if other_error < 0.5 * error else solution

    def _descend(self, q: Array, position: Array, matrix: Array, iterations: int) -> tuple[Array, float]:
        """Iterate to within 0.1 mm and 0.5 mrad; the angles (7,) and the size of the remaining error [m]."""
        q = np.array(q, dtype=np.float64)
        for _ in range(iterations):
            error, jacobian = self._linearise(q, position, matrix)
            if np.abs(error[:3]).max() < 1e-4 and np.abs(error[3:]).max() < 5e-4 * _ROTATION_WEIGHT:
                return q, 0.0
            q = q + _bounded_step(q, error, jacobian)
        return q, float(np.linalg.norm(self._linearise(q, position, matrix)[0]))

    def pose(self, q: Array) -> tuple[Array, Array]:
        """TCP position (3,) [m] and rotation matrix (3, 3) at joint angles `q` (7,) [rad]."""
        self._data.qpos[:7] = q
        mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def _linearise(self, q: Array, position: Array, matrix: Array) -> tuple[Array, Array]:
        """Weighted pose error (6,) and Jacobian (6, 7) at `q`."""
        tip, current = self.pose(q)
        relative = matrix @ current.T
        turn = 0.5 * (relative[_NEXT, _AFTER] - relative[_AFTER, _NEXT])
        error = np.concatenate([position - tip, -_ROTATION_WEIGHT * turn])
        axes, arms = self._data.xaxis[:7], tip - self._data.xanchor[:7]
        linear = axes[:, _NEXT] * arms[:, _AFTER] - axes[:, _AFTER] * arms[:, _NEXT]  # axes x arms
        return error, np.concatenate([linear.T, _ROTATION_WEIGHT * axes.T])


def _bounded_step(q: Array, error: Array, jacobian: Array) -> Array:
    """Damped least-squares step (7,) [rad] with a null-space pull; joints at their limits are held there."""
    low, high = JOINT_LOW + _LIMIT_MARGIN - q, JOINT_HIGH - _LIMIT_MARGIN - q
    posture = _POSTURE_GAIN * (HOME - q)
    held = np.zeros(len(q), dtype=bool)
    step = np.zeros(len(q))
    for _ in range(len(q)):
        free = ~held
        part = jacobian[:, free]
        remaining = error - jacobian[:, held] @ step[held]
        regular = part @ part.T + (_DAMPING[0] + _DAMPING[1] * error @ error) * np.eye(len(error))
        step[free] = posture[free] + part.T @ np.linalg.solve(regular, remaining - part @ posture[free])
        size = np.abs(step[free]).max()
        if size > _MAX_STEP:
            step[free] *= _MAX_STEP / size
        outside = free & ((step < low) | (step > high))
        if not outside.any():
            break
        held |= outside
        step[outside] = np.clip(step[outside], low[outside], high[outside])
    return np.clip(step, low, high)
