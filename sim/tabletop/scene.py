"""The MuJoCo model of `scene.xml`, compiled once per process and shared read-only by all environments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mujoco

from sim.render import tune
from sim.tabletop import tasks

SCENE = Path(__file__).with_name("scene.xml")
SIM_DT = 0.004  # [s]
FINGER_STROKE = 0.05  # travel of one finger [m]; the gripper opens to twice that
CAMERAS, MAX_IMAGE_SIZE = tasks.CAMERAS, tasks.MAX_IMAGE_SIZE


@dataclass(frozen=True)
class Scene:
    """The compiled model and the ids that the environment uses, resolved once."""

    model: mujoco.MjModel
    tcp_site: int
    bin_mocap: int
    plate_mocap: int
    cube_bodies: tuple[int, ...]
    cube_qpos: tuple[int, ...]  # first qpos address of each cube's free joint
    cube_qvel: tuple[int, ...]


@cache
def load_scene() -> Scene:
    """Compile the scene (once per process) with the fast rendering settings."""
    model = mujoco.MjModel.from_xml_path(str(SCENE))
    tune(model)
    joints = [model.joint(f"cube_{color}") for color in tasks.COLORS]
    return Scene(
        model=model,
        tcp_site=model.site("tcp").id,
        bin_mocap=int(model.body("bin").mocapid[0]),
        plate_mocap=int(model.body("plate").mocapid[0]),
        cube_bodies=tuple(model.body(f"cube_{color}").id for color in tasks.COLORS),
        cube_qpos=tuple(int(joint.qposadr[0]) for joint in joints),
        cube_qvel=tuple(int(joint.dofadr[0]) for joint in joints),
    )
