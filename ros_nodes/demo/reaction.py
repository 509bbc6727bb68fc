"""Reaction time: from an event in the scene to the first command that it changes.

In simulated time an episode repeats itself to the last bit. So it runs twice, and in the second run the object of the
instruction is pushed aside; until the policy's answer to that reaches the arm, both send the same commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ceed_vla.kinematics import Array

DISTANCE = 0.04  # that the object moves [m]
WHEN = (0.2, 0.8)  # from the start of the episode [s]: two periods of chunks on the way, before most grasps
PATIENCE = 1.5  # for a command that differs [s]
Event = tuple[float, Array]  # the object moves so long [s] after the start by (2,) [m]


def draw_event(seed: int) -> Event:
    """The event of an episode: the same for all policies."""
    random = np.random.default_rng([seed, 1])
    after, angle = random.uniform(*WHEN), random.uniform(0.0, 2.0 * np.pi)
    return after, DISTANCE * np.array([np.cos(angle), np.sin(angle)])


def first_change(calm: Sequence[Any], stirred: Sequence[Any]) -> float:
    """When the run with the event first sent what the other did not [s]; both are of (time, ...). inf: never."""
    return next((ours[0] for theirs, ours in zip(calm, stirred, strict=False) if theirs != ours), np.inf)
