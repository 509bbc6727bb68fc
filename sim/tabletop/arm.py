"""Kinematics of the 7-joint arm in `arm.xml`: joint limits, pose and Jacobian.

The tool centre point (TCP) frame has x forward, y to the left and z up when the gripper points
straight down, so its orientation is the identity there and the sign of its quaternion never flips
in normal use.
"""

from __future__ import annotations

import mujoco
import numpy as np

from ceed_vla.kinematics import AFTER, NEXT, ArmKinematics, Array

JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # [rad]
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])  # [rad]
# gripper down, fingers open along y [rad]
HOME = np.array([0.0, -0.60, 0.0, -2.55, 0.0, 1.95, np.pi / 4])


class SceneArm(ArmKinematics):
    """The arm of a compiled scene, whose first seven joints are the arm's."""

    def __init__(self, model: mujoco.MjModel, tcp_site: int) -> None:
        super().__init__(JOINT_LOW, JOINT_HIGH, HOME)
        self._model = model
        self._data = mujoco.MjData(model)  # scratch: the caller's state is never touched
        self._site = tcp_site

    def pose(self, q: Array) -> tuple[Array, Array]:
        self._data.qpos[:7] = q
        mujoco.mj_kinematics(self._model, self._data)
        return (
            self._data.site_xpos[self._site].copy(),
            self._data.site_xmat[self._site].reshape(3, 3).copy(),
        )

    def jacobian(self) -> tuple[Array, Array]:
        axes = self._data.xaxis[:7]
        arms = self._data.site_xpos[self._site] - self._data.xanchor[:7]
        linear = axes[:, NEXT] * arms[:, AFTER] - axes[:, AFTER] * arms[:, NEXT]  # axes x arms
        return linear.T, axes.T
