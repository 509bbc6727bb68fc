"""The tabletop arm's forward kinematics by its Denavit-Hartenberg table, independent of MuJoCo and
of `arm.xml`.

The figures are the public ones of the Franka Emika Panda (modified / Craig convention).
"""

from __future__ import annotations

import numpy as np

from ceed_vla.kinematics import Array, rotation

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


def forward_kinematics(q: Array) -> tuple[Array, Array]:
    """TCP position (3,) [m] and rotation (3, 3) in the base frame for joint angles (7,) [rad]."""
    position, frame = np.zeros(3), np.eye(3)
    for (a, d, alpha), angle in zip(DH, q, strict=True):
        position = position + frame @ np.array([a, -d * np.sin(alpha), d * np.cos(alpha)])
        frame = frame @ rotation(0, alpha) @ rotation(2, angle)
    position = position + frame @ np.array([0.0, 0.0, FLANGE_OFFSET + TCP_OFFSET])
    return position, frame @ rotation(2, HAND_YAW) @ rotation(0, np.pi)
