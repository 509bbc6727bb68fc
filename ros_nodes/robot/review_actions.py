"""Compares what a policy's actions are (names, units, steps per second) with a robot's file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ceed_vla.ros_nodes.robot.findings import PROBLEM, WARNING, Finding
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.serving.predictor_types import PolicySpec
from ceed_vla.texts import short

_RATE_SLACK = 0.02  # relative difference of the rates that is tolerated
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_OTHER_POSE = {
    name: _POSE[3 + place]
    for names in (
        ("rx", "ry", "rz"),
        ("wx", "wy", "wz"),
        ("axis_angle1", "axis_angle2", "axis_angle3"),
    )
    for place, name in enumerate(names)
}
_GRIPPER = "gripper"
# Names that only count the dimensions.
_NUMBERED = re.compile(r"(motor|action|joint|dim|axis)?[_ .]?\d+")
_KIND = re.compile(r"[._](pos|position|vel|velocity|delta|target|goal)$")
_UNITS = {
    "radians": "rad",
    "radian": "rad",
    "degrees": "deg",
    "degree": "deg",
    "meters": "m",
    "metres": "m",
    "meter": "m",
    "metre": "m",
}


def contract_findings(robot: RobotConfig, spec: PolicySpec) -> Iterator[Finding]:
    """What of the policy's actions does not fit the robot; what the policy does not say, fits."""
    rate = 1.0 / robot.action.dt
    if spec.control_rate and abs(rate / spec.control_rate - 1.0) > _RATE_SLACK:
        yield Finding(
            "action.dt",
            f"the robot makes {rate:.4g} steps per second",
            f"the policy has learnt {spec.control_rate:.4g} steps per second",
            f"Give {1.0 / spec.control_rate:.4g}.",
            "rate",
        )
    yield from _kinds(robot, spec.action_names)
    yield from _names(robot, spec.action_names)
    yield from _units(robot, spec.units)


def _kinds(robot: RobotConfig, named: Sequence[str]) -> Iterator[Finding]:
    """Names of velocities, or of increments, on a robot that takes something else."""
    wrong = {"joint_position": ("vel", "velocity", "delta"), "joint_delta": ("vel", "velocity")}
    for name in named:
        found = _KIND.search(name.lower())
        if found and found[1] in wrong.get(robot.action.kind, ()):
            yield Finding(
                "action.kind",
                f"the robot takes actions of the kind {robot.action.kind}",
                f"the policy's include {short(name, 50)}",
                "Use a policy of this kind, or another kind.",
                "action_names",
            )
            return


def _names(robot: RobotConfig, named: Sequence[str]) -> Iterator[Finding]:
    pose = robot.action.kind == "ee_delta"
    ours = list(_POSE if pose else robot.arm.joints)
    gripped = robot.gripper is not None and robot.gripper.action != "none"
    if len(named) != len(ours) + gripped:
        return  # unknown, or refused for its number
    theirs = [_plain(name, pose=pose) for name in named][: len(ours)]  # a gripper has any name
    wanted = [_plain(name, pose=pose) for name in ours]
    if theirs == wanted or all(_NUMBERED.fullmatch(name) for name in theirs):
        return
    # Some datasets give both arms' joints a prefix.
    prefix = theirs[0].removesuffix(wanted[0])
    if [name.removeprefix(prefix) for name in theirs] == wanted:
        return
    known = sum(name in wanted for name in theirs)
    place = next(place for place, name in enumerate(wanted) if theirs[place] != name)
    yield Finding(
        "action.kind" if pose else "arm.joints",
        f"value {place} of an action is {short(ours[place], 50)}",
        f"the policy's is {short(named[place], 50)} (all: {short(', '.join(named))})",
        "Use a policy of this robot, with its order of the values."
        if known
        else "Compare them: both sides have other names.",
        "action_names",
        PROBLEM if known else WARNING,
    )


def _units(robot: RobotConfig, units: Sequence[str]) -> Iterator[Finding]:
    arm, pose = robot.arm, robot.action.pose
    if len(units) != robot.action_dim:
        return
    ours: tuple[str, ...] = (arm.unit,) * len(arm.joints)
    if robot.action.kind == "ee_delta":
        scaled = pose is None or (pose.position_scale, pose.rotation_scale) != (1.0, 1.0)
        ours = () if scaled else ("m", "m", "m", "rad", "rad", "rad")
    elif arm.scale:
        ours = ()  # the file maps any unit
    for place, (unit, given) in enumerate(zip(ours, units, strict=False)):
        theirs = _UNITS.get(given.lower(), given.lower())
        if unit != theirs:
            yield Finding(
                "arm.unit",
                f"value {place} of an action is read in {unit}",
                f"the policy's unit is {short(given, 50)}",
                "Give the policy's unit (rad or deg), or a scale.",
                "units",
            )
            return


def _plain(name: str, *, pose: bool) -> str:
    """A name without what only some datasets and robots add."""
    plain = _KIND.sub("", name.lower()).removesuffix("_joint")
    plain = plain.removeprefix("main_").removeprefix("delta_")
    if pose:
        plain = plain.removeprefix("ee.").removeprefix("ee_")
        plain = plain if plain in (*_POSE, *_OTHER_POSE) else plain.removeprefix("d")
        plain = _OTHER_POSE.get(plain, plain)
    return plain
