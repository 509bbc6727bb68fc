"""Meta-World's tasks (arXiv 1910.10897, version 3) under one Gymnasium id.

They are rendered twenty times as fast as LeRobot's. Importing this package registers the id; it
imports neither torch nor MuJoCo.
"""

from __future__ import annotations

import gymnasium

ENV_ID = "ceed_vla/Metaworld-v3"
MAX_EPISODE_STEPS = 400  # LeRobot's limit

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID, "ceed_vla.sim.metaworld.env:MetaworldTasks", max_episode_steps=MAX_EPISODE_STEPS
    )
