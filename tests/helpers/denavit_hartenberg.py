"""The tabletop arm's forward kinematics by its Denavit-Hartenberg table, independent of MuJoCo."""

from __future__ import annotations

import numpy as np

from ceed_vla.kinematics import Array, rotation
from sim.tabletop import arm


def forward_kinematics(q: Array) -> tuple[Array, Array]:
    """TCP position (3,) [m] and rotation matrix (3, 3) in the base frame, of joint angles (7,) [rad]."""
    position, frame = np.zeros(3), np.eye(3)
    for (a, d, alpha), angle in zip(arm.DH, q, strict=True):
        position = position + frame @ np.array([a, -d * np.sin(alpha), d * np.cos(alpha)])
        frame = frame @ rotation(0, alpha) @ rotation(2, angle)
    position = position + frame @ np.array([0.0, 0.0, arm.FLANGE_OFFSET + arm.TCP_OFFSET])
    return position, frame @ rotation(2, arm.HAND_YAW) @ rotation(0, np.pi)
