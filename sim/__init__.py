"""Simulated environments, scripted experts, recording and evaluation.

Importing this package registers the Gymnasium ids; it does not import torch.
"""

from __future__ import annotations

import os
import sys

import gymnasium

# MuJoCo reads this when it is imported: render off screen where there is no display.
if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

TABLETOP_ID = "ceed_vla/Tabletop-v0"
TABLETOP_MAX_STEPS = 120

if TABLETOP_ID not in gymnasium.registry:
    gymnasium.register(
        id=TABLETOP_ID,
        entry_point="sim.tabletop.env:TabletopEnv",
        max_episode_steps=TABLETOP_MAX_STEPS,
    )

__all__ = ["TABLETOP_ID", "TABLETOP_MAX_STEPS"]
