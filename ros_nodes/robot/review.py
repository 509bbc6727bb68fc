"""Compares a robot's file with the arm's model and with the ranges of a checkpoint's training data.

`robot check`, and the node when it is configured, refuse a file with problems, unless the file's
`allow` names the rule. Everything here is a pure function of the files' contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.findings import PROBLEM, WARNING, Finding, worst
from ceed_vla.ros_nodes.robot.review_actions import contract_findings
from ceed_vla.ros_nodes.robot.review_data import (
    FASTEST,
    LARGEST_ANGLE,
    WIDEST,
    Joints,
    action_findings,
    state_findings,
)
from ceed_vla.ros_nodes.robot.robot_config import Gripper, RobotConfig
from ceed_vla.serving.data_ranges import ACTION, Range
from ceed_vla.serving.predictor_types import PolicySpec

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

LONGEST_STEP = 0.5  # [rad]
_MODEL_SLACK = 0.02  # tolerance between the file's limits and the model's [rad]
_VELOCITY_SLACK = 1.01


def review(
    robot: RobotConfig,
    model: ModelArm | None,
    physical: Array,
    ranges: Mapping[str, Range | str],
    spec: PolicySpec,
) -> list[Finding]:
    """Return what does not fit, problems first.

    Args:
        robot: The robot's file.
        model: The arm's model; None if the file names none.
        physical: Largest physical velocities of the joints (J,) [rad/s].
        ranges: Ranges of every state and of the action, from `read_ranges`.
        spec: The policy's inputs and outputs.
    """
    joints = Joints.of(robot, model, physical)
    found = [*_limits(robot, model), *_home(robot, joints), *_gripper(robot.gripper)]
    found += contract_findings(robot, spec)
    for feature in robot.states:
        seen = ranges.get(feature, "")
        if isinstance(seen, Range):
            found += state_findings(robot, joints, feature, seen)
    done = ranges.get(ACTION, "")
    if isinstance(done, Range):
        found += action_findings(robot, joints, done)
    unique = {(finding.key, finding.allow, finding.severity): finding for finding in found[::-1]}
    judged = [_judged(finding, robot.allow) for finding in list(unique.values())[::-1]]
    return sorted(judged, key=lambda finding: finding.severity != PROBLEM)


def feature_lengths(robot: RobotConfig) -> dict[str, int]:
    """Map every feature whose range `review` reads to its number of values in the robot's file."""
    lengths = {feature: robot.state_dim(feature) for feature in robot.states}
    return {**lengths, ACTION: robot.action_dim}


def _judged(finding: Finding, allowed: Sequence[str]) -> Finding:
    """Return the finding; a problem that the file allows becomes a warning."""
    if finding.severity == PROBLEM and finding.allow in allowed:
        remedy = f"The file allows it (allow: [{finding.allow}])."
        return replace(finding, remedy=remedy, severity=WARNING)
    return finding


def _limits(robot: RobotConfig, model: ModelArm | None) -> Iterator[Finding]:
    names, limits = robot.arm.joints, robot.limits
    velocity = np.array(limits.velocity)
    step = np.array(limits.step)
    if (velocity > FASTEST).any():
        joint, who = worst(names, velocity - FASTEST)
        yield Finding(
            "limits.velocity",
            f"{who} may move at {velocity[joint]:g} rad/s",
            f"no joint of an arm is faster than {FASTEST:g} rad/s",
            "Give rad/s, not degrees/s.",
            "velocity",
        )
    elif model is not None and (velocity > _VELOCITY_SLACK * model.velocity).any():  # NaN: unknown
        known = np.nan_to_num(model.velocity, nan=np.inf)
        joint, who = worst(names, velocity - _VELOCITY_SLACK * known)
        yield Finding(
            "limits.velocity",
            f"{who} may move at {velocity[joint]:g} rad/s",
            f"the model's limit is {model.velocity[joint]:g} rad/s",
            "Lower it.",
            "velocity",
        )
    if (step > LONGEST_STEP).any():
        joint, who = worst(names, step - LONGEST_STEP)
        yield Finding(
            "limits.step",
            f"commands of {who} may be {step[joint]:g} rad from the measured position",
            f"it must be at most {LONGEST_STEP:g} rad",
            "Lower it; it bounds the effect of one wrong command.",
            "step",
        )
    physical = np.array(limits.physical_velocity)
    if (physical > FASTEST).any():
        joint, who = worst(names, physical - FASTEST)
        yield Finding(
            "limits.physical_velocity",
            f"{who} reaches {physical[joint]:g} rad/s",
            f"no joint of an arm is faster than {FASTEST:g} rad/s",
            "Lower it; it serves to detect joint states that cannot be true.",
            severity=WARNING,
        )
    if limits.low:
        yield from _positions(robot, model)


def _positions(robot: RobotConfig, model: ModelArm | None) -> Iterator[Finding]:
    names = robot.arm.joints
    low = np.array(robot.limits.low)
    high = np.array(robot.limits.high)
    far = np.maximum(np.abs(low), np.abs(high)) - LARGEST_ANGLE
    if (far > 0.0).any():
        joint, who = worst(names, far)
        yield Finding(
            "limits.position",
            f"{who} may move from {low[joint]:g} to {high[joint]:g} rad",
            f"a joint has at most {LARGEST_ANGLE:.3g} rad to either side",
            "These are degrees; limits are always in radians, for any arm.unit.",
            "units",
        )
    if model is None:
        return
    outside = np.maximum(model.low - low, high - model.high) - _MODEL_SLACK
    if (outside > 0.0).any():
        joint, who = worst(names, outside)
        yield Finding(
            "limits.position",
            f"{who} may move from {low[joint]:g} to {high[joint]:g} rad",
            f"the model's limits are {model.low[joint]:.4g} to {model.high[joint]:.4g} rad",
            "Stay inside them, or omit limits.position to use the model's.",
            "position_limits",
        )


def _home(robot: RobotConfig, joints: Joints) -> Iterator[Finding]:
    if not robot.arm.home:
        return
    home = np.array(robot.arm.home)
    outside = np.maximum(joints.low - home, home - joints.high)
    if (outside > 0.0).any():
        joint, who = worst(joints.names, outside)
        yield Finding(
            "arm.home",
            f"{who} is at {home[joint]:g} rad",
            f"its limits are {joints.low[joint]:.4g} to {joints.high[joint]:.4g} rad",
            "Give a posture inside them.",
        )


def _gripper(gripper: Gripper | None) -> Iterator[Finding]:
    if gripper is None:
        return
    widest = max(abs(gripper.open), abs(gripper.closed), gripper.open - gripper.closed)
    if widest > WIDEST:
        yield Finding(
            "gripper.open",
            f"the gripper goes from {gripper.closed:g} to {gripper.open:g} m",
            f"no gripper opens wider than {WIDEST:g} m",
            "Give metres; opening_scale and action_scale are for the units of driver and policy.",
            "gripper",
        )
