"""The MuJoCo model: table, arm with primitive links, parallel gripper, cubes, bin, plate, edge zones, cameras.

The model is compiled once per process and shared read-only by all environments. An episode changes only `mjData`
(joint positions, mocap poses of bin and plate), so a reset never compiles anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from xml.etree import ElementTree

import mujoco
import numpy as np

from sim.render import tune
from sim.tabletop import arm, tasks

SIM_DT = 0.004  # [s]
FINGER_STROKE = 0.05  # travel of one finger [m]; the gripper opens to twice that
CAMERAS, MAX_IMAGE_SIZE = tasks.CAMERAS, tasks.MAX_IMAGE_SIZE

# Link masses [kg], centres of mass [m] and diagonal inertias [kg m^2]: round figures of a light 7-joint arm.
_LINKS = (
    (3.0, (0.0, -0.02, -0.08), (0.03, 0.03, 0.01)),
    (3.0, (0.0, -0.08, 0.02), (0.03, 0.01, 0.03)),
    (2.5, (0.03, 0.02, -0.06), (0.02, 0.02, 0.01)),
    (2.5, (-0.04, 0.06, 0.02), (0.02, 0.01, 0.02)),
    (2.0, (0.0, 0.03, -0.12), (0.02, 0.02, 0.005)),
    (1.5, (0.05, 0.0, 0.0), (0.005, 0.005, 0.005)),
    (0.6, (0.0, 0.0, 0.07), (0.001, 0.001, 0.001)),
)
# Damping belongs to the joints, not to the actuators: an actuator at its force limit would lose it and chatter.
_ARM_GAINS = ((4000, 200),) * 4 + ((2000, 80),) * 3  # stiffness [N m/rad], damping [N m s/rad]
_FINGER_GAIN = (1000, 120)  # stiffness [N/m], damping [N s/m]
_RGBA = {
    "red": "0.86 0.08 0.08 1",
    "green": "0.08 0.62 0.12 1",
    "blue": "0.10 0.22 0.86 1",
    "yellow": "0.98 0.84 0.08 1",
    "bin": "0.30 0.22 0.17 1",
    "plate": "0.97 0.97 0.97 1",
    "table": "0.68 0.66 0.63 1",
    "left": "0.50 0.40 0.58 1",
    "right": "0.34 0.54 0.56 1",
    "link": "0.88 0.88 0.86 1",
    "joint": "0.32 0.34 0.36 1",
    "pad": "0.12 0.12 0.12 1",
}
# Collision bits: 1 = static things, 2 = cubes, 4 = gripper. Static things never meet each other, nor does the gripper.
_STATIC = 'contype="1" conaffinity="6"'
_CUBE = 'contype="2" conaffinity="7"'
_GRIPPER = 'contype="4" conaffinity="3"'
_VISUAL = 'contype="0" conaffinity="0" group="1"'


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
    model = mujoco.MjModel.from_xml_string(scene_xml())
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


def scene_xml() -> str:
    """The whole scene in MJCF."""
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{SIM_DT}" integrator="implicitfast" cone="elliptic" impratio="1"/>
  <visual>
    <global offwidth="{MAX_IMAGE_SIZE}" offheight="{MAX_IMAGE_SIZE}"/>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <map znear="0.01" zfar="10"/>
  </visual>
  {_defaults()}
  <worldbody>
    <light directional="true" pos="0.5 0 2" dir="-0.25 0.15 -1" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    <camera name="front" pos="1.5 0 0.95" xyaxes="0 1 0 -0.659 0 0.752" fovy="23.2"/>
    <geom type="cylinder" size="0.07 0.07" pos="0 0 0.07" rgba="{_RGBA["joint"]}" {_VISUAL}/>
    {_arm()}
    <geom type="plane" size="5 5 0.1" pos="0 0 -0.4" rgba="0.42 0.45 0.48 1" {_STATIC}/>
    <geom type="box" size="0.45 0.55 0.02" pos="0.40 0 -0.02" rgba="{_RGBA["table"]}" {_STATIC}/>
    {_zone("left", 1)}
    {_zone("right", -1)}
    {_bin()}
    <body name="plate" mocap="true" pos="0.64 -0.1 0">
      <geom type="cylinder" size="{tasks.PLATE_RADIUS} {tasks.PLATE_HEIGHT / 2}" pos="0 0 {tasks.PLATE_HEIGHT / 2}"
        rgba="{_RGBA["plate"]}" {_STATIC}/>
    </body>
    {"".join(_cube(color) for color in tasks.COLORS)}
  </worldbody>
  <actuator>
    {_actuators()}
  </actuator>
</mujoco>"""


def arm_xml() -> str:
    """The arm alone in MJCF: joints, fingers and TCP site, for kinematics outside the simulation."""
    root = ElementTree.fromstring(f"""
<mujoco model="tabletop_arm">
  <compiler angle="radian" autolimits="true"/>
  {_defaults()}
  <worldbody>{_arm()}</worldbody>
</mujoco>""")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _defaults() -> str:
    return f"""<default>
    <geom solref="0.01 1" friction="1 0.01 0.0005"/>
    <default class="arm"><joint axis="0 0 1" armature="0.1"/></default>
    <default class="finger"><joint type="slide" armature="0.05" damping="{_FINGER_GAIN[1]}"
      range="0 {FINGER_STROKE}"/></default>
  </default>"""


def _zone(side: str, sign: int) -> str:
    half_x, half_y = 0.5 * (tasks.ZONE_X[1] - tasks.ZONE_X[0]), 0.5 * (tasks.ZONE_OUTER - tasks.ZONE_INNER)
    centre = 0.5 * (tasks.ZONE_X[0] + tasks.ZONE_X[1])
    return (
        f'<geom name="zone_{side}" type="box" size="{half_x} {half_y} 0.0005" '
        f'pos="{centre} {sign * tasks.ZONE_CENTRE} 0" rgba="{_RGBA[side]}" {_VISUAL}/>'
    )


def _bin() -> str:
    inner, wall, height = tasks.BIN_INNER_HALF, tasks.BIN_WALL, tasks.BIN_HEIGHT
    outer, rgba = inner + wall, f'rgba="{_RGBA["bin"]}"'
    walls = "".join(
        f'<geom type="box" size="{sx} {sy} {height / 2}" pos="{x} {y} {height / 2}" {rgba} {_STATIC}/>'
        for sx, sy, x, y in (
            (wall / 2, outer, inner + wall / 2, 0),
            (wall / 2, outer, -inner - wall / 2, 0),
            (outer, wall / 2, 0, inner + wall / 2),
            (outer, wall / 2, 0, -inner - wall / 2),
        )
    )
    floor = f'<geom type="box" size="{outer} {outer} {wall / 2}" pos="0 0 {wall / 2}" {rgba} {_STATIC}/>'
    return f'<body name="bin" mocap="true" pos="0.64 0.1 0">{floor}{walls}</body>'


def _cube(color: str) -> str:
    half = tasks.CUBE_HALF
    return (
        f'<body name="cube_{color}" pos="0 0 1"><freejoint name="cube_{color}"/>'
        f'<geom name="cube_{color}" type="box" size="{half} {half} {half}" mass="0.08" rgba="{_RGBA[color]}" '
        f"{_CUBE}/></body>"
    )


def _arm() -> str:
    """Nested bodies, one per Denavit-Hartenberg row, with visual capsules between the joints."""
    opening, closing = "", ""
    for index, ((a, d, alpha), (mass, com, inertia)) in enumerate(zip(arm.DH, _LINKS, strict=True)):
        position = _text(a, -d * np.sin(alpha), d * np.cos(alpha))
        low, high = arm.JOINT_LOW[index], arm.JOINT_HIGH[index]
        opening += (
            f'<body name="link{index + 1}" pos="{position}" euler="{alpha:.9f} 0 0" gravcomp="1" childclass="arm">'
            f'<inertial pos="{_text(*com)}" mass="{mass}" diaginertia="{_text(*inertia)}"/>'
            f'<joint name="joint{index + 1}" range="{low} {high}" damping="{_ARM_GAINS[index][1]}"/>{_skin(index)}'
        )
        closing += "</body>"
    return opening + _hand() + closing


def _skin(index: int) -> str:
    """Visual geoms of one link: a capsule towards the next joint and a dark cylinder on its own axis."""
    size, end = 0.04, (0.0, 0.0, arm.FLANGE_OFFSET - 0.03)
    if index < len(arm.DH) - 1:
        a, d, alpha = arm.DH[index + 1]
        size, end = 0.05, (a, -d * np.sin(alpha), d * np.cos(alpha))
    capsule = f'<geom type="capsule" size="{size}" fromto="0 0 0 {_text(*end)}" rgba="{_RGBA["link"]}" {_VISUAL}/>'
    axis = f'<geom type="cylinder" size="0.055 0.05" rgba="{_RGBA["joint"]}" {_VISUAL}/>'
    return (capsule if np.linalg.norm(end) > 0.05 else "") + axis


def _hand() -> str:
    """Palm, wrist camera, TCP site and two fingers; z points out of the palm, the fingers slide along y."""
    fingers = "".join(_finger(name, sign) for name, sign in (("left", -1), ("right", 1)))
    return (
        f'<body name="hand" pos="0 0 {arm.FLANGE_OFFSET}" euler="0 0 {arm.HAND_YAW}" gravcomp="1">'
        '<inertial pos="0 0 0.03" mass="0.6" diaginertia="0.002 0.001 0.002"/>'
        f'<geom type="box" size="0.022 0.07 0.022" pos="0 0 0.023" rgba="{_RGBA["link"]}" {_GRIPPER}/>'
        f'<site name="tcp" pos="0 0 {arm.TCP_OFFSET}" quat="0 1 0 0" group="4"/>'
        '<camera name="wrist" pos="0.075 0 0.01" xyaxes="0 1 0 0.966 0 0.259" fovy="78"/>'
        f"{fingers}</body>"
    )


def _finger(name: str, sign: int) -> str:
    tip = arm.TCP_OFFSET + 0.01
    length = 0.5 * (tip - 0.045)
    return (
        f'<body name="finger_{name}" pos="0 {sign * 0.006} 0" gravcomp="1" childclass="finger">'
        f'<inertial pos="0 0 {tip - length}" mass="0.08" diaginertia="0.0001 0.0001 0.0001"/>'
        f'<joint name="finger_{name}" axis="0 {sign} 0"/>'
        f'<geom type="box" size="0.011 0.006 {length}" pos="0 0 {tip - length}" rgba="{_RGBA["joint"]}" '
        f'friction="1.5 0.02 0.001" condim="4" priority="1" {_GRIPPER}/>'
        f'<geom type="box" size="0.0112 0.0062 0.012" pos="0 0 {tip - 0.0118}" rgba="{_RGBA["pad"]}" {_VISUAL}/></body>'
    )


def _actuators() -> str:
    joints = "".join(
        f'<position joint="joint{index + 1}" kp="{stiffness}" forcerange="-200 200"/>'
        for index, (stiffness, _) in enumerate(_ARM_GAINS)
    )
    return joints + "".join(
        f'<position joint="finger_{name}" kp="{_FINGER_GAIN[0]}" forcerange="-40 40" ctrlrange="0 {FINGER_STROKE}"/>'
        for name in ("left", "right")
    )


def _text(*values: float) -> str:
    return " ".join(f"{value:.9g}" for value in values)
