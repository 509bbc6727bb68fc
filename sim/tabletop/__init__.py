"""The tabletop: a 7-joint arm with a parallel gripper, coloured cubes, a bin, a plate, edge zones.

Importing this package registers the Gymnasium id; it imports neither torch nor MuJoCo.
"""

from __future__ import annotations

import gymnasium

ENV_ID = "ceed_vla/Tabletop-v0"
MAX_EPISODE_STEPS = 120

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID, "ceed_vla.sim.tabletop.env:TabletopEnv", max_episode_steps=MAX_EPISODE_STEPS
    )
