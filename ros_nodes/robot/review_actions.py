"""Compares what a policy's actions are (names, units, steps per second) with a robot's file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ceed_vla.ros_nodes.robot.findings import Finding
from ceed_vla.ros_nodes.robot.robot_file import RobotConfig
from ceed_vla.serving.predictor_types import PolicySpec
from ceed_vla.texts import short

_RATE_SLACK = 0.01  # relative difference of the rates that is tolerated
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_OTHER_POSE = {"rx": "roll", "ry": "pitch", "rz": "yaw"}
_GRIPPER = "gripper"
# Names that only count the dimensions.
_NUMBERED = re.compile(r"(motor|action|joint|dim)?[_ .]?\d+")


def contract_findings(robot: RobotConfig, spec: PolicySpec) -> Iterator[Finding]:
    """What of the policy's actions does not fit the robot; what the policy does not say, fits."""
    rate = 1.0 / robot.action.dt
    if spec.control_rate and abs(rate / spec.control_rate - 1.0) > _RATE_SLACK:
        yield Finding(
            "action.dt",
            f"the robot makes {rate:g} steps per second",
            f"the policy has learnt {spec.control_rate:g} steps per second",
            f"Give {1.0 / spec.control_rate:.4g}.",
            "rate",
        )
    yield from _names(robot, spec)
    yield from _units(robot, spec)


def _names(robot: RobotConfig, spec: PolicySpec) -> Iterator[Finding]:
    pose = robot.action.kind == "ee_delta"
    ours = [*(_POSE if pose else robot.arm.joints)]
    if robot.gripper is not None and robot.gripper.action != "none":
        ours.append(_GRIPPER)
    named = list(spec.action_names)
    if len(named) != len(ours) or all(_NUMBERED.fullmatch(name.lower()) for name in named):
        return
    theirs = [_plain(name, pose=pose) for name in named]
    wanted = [_plain(name, pose=pose) for name in ours]
    # A gripper has any name, but it is the last dimension.
    if wanted[-1] == _GRIPPER and theirs[-1] not in wanted:
        theirs[-1] = _GRIPPER
    if theirs != wanted:
        pairs = enumerate(zip(theirs, wanted, strict=True))
        place = next(place for place, (given, own) in pairs if given != own)
        yield Finding(
            "action.kind" if pose else "arm.joints",
            f"value {place} of an action is {ours[place]}",
            f"the policy's is {short(named[place])} (all: {short(', '.join(named))})",
            "Give the joints in the policy's order." if not pose else "Use a policy of this robot.",
            "action_names",
        )


def _units(robot: RobotConfig, spec: PolicySpec) -> Iterator[Finding]:
    arm = robot.arm
    if len(spec.units) != robot.action_dim or arm.scale:
        return
    ours: tuple[str, ...] = ("m", "m", "m", "rad", "rad", "rad")
    if robot.action.kind != "ee_delta":
        ours = (arm.unit,) * len(arm.joints)
    for place, (unit, theirs) in enumerate(zip(ours, spec.units, strict=False)):
        if unit != theirs:
            yield Finding(
                "arm.unit",
                f"value {place} of an action is read in {unit}",
                f"the policy's unit is {short(theirs)}",
                "Give the policy's unit, or arm.scale.",
                "units",
            )
            return


def _plain(name: str, *, pose: bool) -> str:
    """A name without what only some datasets and robots add."""
    plain = name.lower().removesuffix("_joint")
    plain = re.sub(r"[._](pos|position|vel|target|delta)$", "", plain)
    plain = plain.removeprefix("main_").removeprefix("delta_").removesuffix("_joint")
    if pose:
        plain = plain if plain in _POSE else plain.removeprefix("d")
        plain = _OTHER_POSE.get(plain, plain)
    return plain
