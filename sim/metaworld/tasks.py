"""Names of Meta-World's tasks and values; importing this does not import Meta-World."""

from __future__ import annotations

import json
from importlib.resources import files

LARGEST_IMAGE = 480  # [px]
# All fifty, by name, with LeRobot's instructions.
INSTRUCTIONS: dict[str, str] = json.loads(
    files("lerobot.envs").joinpath("metaworld_config.json").read_text(encoding="utf-8")
)["TASK_DESCRIPTIONS"]
ALL_TASKS = tuple(INSTRUCTIONS)
# MT10, in Meta-World's order.
TASKS = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")
PRIVILEGED_NAMES = tuple(f"{thing}_d{axis}" for thing in ("object", "target") for axis in "xyz")
