"""The MuJoCo model of `scene.xml`: compiled once per process, shared read-only."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mujoco

from ceed_vla.sim.render import tune
from ceed_vla.sim.tabletop import tasks

SCENE = Path(__file__).with_name("scene.xml")
SIM_DT = 0.004  # [s]
FINGER_STROKE = 0.05  # travel of one finger [m]; the gripper opens to twice that
CAMERAS, MAX_IMAGE_SIZE = tasks.CAMERAS, tasks.MAX_IMAGE_SIZE


class Scene:
    """The compiled model, with fast rendering settings, and the ids that the environment uses."""

    def __init__(self) -> None:
        self.model = model = mujoco.MjModel.from_xml_path(str(SCENE))
        tune(model)
        self.tcp_site: int = model.site("tcp").id
        self.bin_mocap, self.plate_mocap = (
            int(model.body(name).mocapid[0]) for name in ("bin", "plate")
        )
        cubes = [f"cube_{color}" for color in tasks.COLORS]
        self.cube_bodies: list[int] = [model.body(name).id for name in cubes]
        # First addresses of each cube's free joint.
        self.cube_qpos = [int(model.joint(name).qposadr[0]) for name in cubes]
        self.cube_qvel = [int(model.joint(name).dofadr[0]) for name in cubes]


load_scene = cache(Scene)  # once per process
