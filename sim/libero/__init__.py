"""LIBERO's tasks (arXiv 2306.03310) under one Gymnasium id.

The same simulation, initial states, success and images as in LeRobot's `libero` and in other
harnesses, with images rendered on demand. Importing this package registers the id; it imports
neither torch, MuJoCo nor LIBERO.
"""

from __future__ import annotations

import gymnasium

ENV_ID = "ceed_vla/Libero-v1"

if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, "ceed_vla.sim.libero.env:LiberoTasks")
