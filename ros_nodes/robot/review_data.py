"""Compares a robot's file, through its mappings, with the training data of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.findings import PROBLEM, WARNING, Finding, worst
from ceed_vla.ros_nodes.robot.robot_config import Gripper, RobotConfig
from ceed_vla.serving.data_ranges import ACTION, Range

if TYPE_CHECKING:
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

FASTEST = 12.0  # [rad/s]: no joint of an arm is faster
WIDEST = 0.5  # largest opening of a gripper [m]
LARGEST_ANGLE = 4.0 * math.pi  # [rad]: larger limits must be in degrees
_FARTHEST = 5.0  # largest distance of a tool centre point [m]
_OUTSIDE = 0.1  # distance beyond the limits from which on states cause a hold (`pose_trust`) [rad]
_DEGREE = math.pi / 180.0


@dataclass(frozen=True)
class Joints:
    """The arm's resolved limits, one value per joint."""

    names: tuple[str, ...]
    low: Array  # [rad]; infinite without a limit
    high: Array
    physical_velocity: Array  # largest physical velocities [rad/s]

    @classmethod
    def of(cls, robot: RobotConfig, model: ModelArm | None, physical: Array) -> Joints:
        """Return the file's position limits, or the model's if the file has none."""
        if robot.limits.low:
            low = np.array(robot.limits.low)
            high = np.array(robot.limits.high)
        elif model is not None:
            low, high = model.low, model.high
        else:  # `robot_file` refuses this earlier
            low = np.full(len(physical), -np.inf)
            high = np.full(len(physical), np.inf)
        return cls(robot.arm.joints, low, high, physical)

    def beyond(self, low: Array, high: Array) -> Array:
        """Return how far (J,) the range from `low` to `high` exceeds the limits [rad]; negative
        inside. A joint without limits has `LARGEST_ANGLE` to either side.
        """
        lowest = np.maximum(self.low, -LARGEST_ANGLE)
        highest = np.minimum(self.high, LARGEST_ANGLE)
        return np.maximum(lowest - low, high - highest)

    def fit(self, low: Array, high: Array) -> bool:
        """Whether no joint exceeds its limits further than joint states may in motion."""
        return bool((self.beyond(low, high) <= _OUTSIDE).all())


def state_findings(
    robot: RobotConfig,
    joints: Joints,
    feature: str,
    seen: Range,
) -> Iterator[Finding]:
    """Return the findings about a state whose data lie in the range `seen`."""
    at = 0
    for part in robot.states[feature]:
        length = robot.component_dim(part)
        values = seen.part(at, length)
        at += length
        if part == "joint_positions":
            yield from _angles(robot, joints, feature, values, is_state=True)
        elif part == "joint_velocities":
            yield from _speeds(robot, joints, feature, values, 1.0)
        elif part == "finger_opening" and robot.gripper is not None:
            yield from _opening(robot.gripper, feature, values)
        elif part in ("tcp_position", "commanded_position"):
            farthest = float(np.maximum(np.abs(values.low), np.abs(values.high)).max())
            if farthest > _FARTHEST:
                yield Finding(
                    f"state.{feature}",
                    f"{part} reaches {farthest:.4g} in the data ({values.source})",
                    f"it is in metres here, and no arm reaches further than {_FARTHEST:g} m",
                    "The data are in millimetres; the policy needs data in metres.",
                    "units",
                )


def action_findings(robot: RobotConfig, joints: Joints, done: Range) -> Iterator[Finding]:
    """Return the findings about actions whose data lie in the range `done`."""
    body = len(joints.names) if robot.action.kind != "ee_delta" else 6
    arm = done.part(0, body)
    if robot.action.kind == "joint_position":
        yield from _angles(robot, joints, ACTION, arm, is_state=False)
    elif robot.action.kind == "joint_delta":
        yield from _speeds(robot, joints, ACTION, arm, robot.action.dt)
    else:
        yield from _pose_steps(arm)
    gripper = robot.gripper
    if gripper is None or gripper.action == "none":
        return
    last = done.part(body, 1)
    if gripper.action == "opening":
        yield from _opening(gripper, ACTION, last)
    else:
        yield from _binary(last)


def _angles(
    robot: RobotConfig,
    joints: Joints,
    feature: str,
    values: Range,
    *,
    is_state: bool,
) -> Iterator[Finding]:
    """Compare the data's joint positions, through the file's mapping, with the limits."""
    ends = np.sort([robot.arm.units.ours(values.low), robot.arm.units.ours(values.high)], axis=0)
    low, high = ends
    excess = joints.beyond(low, high) - _OUTSIDE
    wrong = excess > 0.0
    if not wrong.any():
        yield from _hardly_moves(robot, joints, feature, values, ends)
        return
    joint, who = worst(joints.names, excess)
    told = (
        f"{feature} of {who} goes from {values.low[joint]:.4g} to {values.high[joint]:.4g} in the "
        f"data ({values.source}), which is {low[joint]:.4g} to {high[joint]:.4g} rad by this file"
    )
    rule = f"its limits are {joints.low[joint]:.4g} to {joints.high[joint]:.4g} rad"
    key, allow, remedy = _cause(robot, joints, low, high, wrong)
    # The arm holds if its states are outside; a target outside is clamped.
    lost = bool((wrong & _centre_outside(joints, low, high)).any())
    refused = values.measured and (is_state or lost or key != "limits.position")
    yield Finding(key, told, rule, remedy, allow, PROBLEM if refused else WARNING)


def _centre_outside(joints: Joints, low: Array, high: Array) -> NDArray[np.bool_]:
    """Return which joints (J,) are outside their limits for half of the range."""
    centre = 0.5 * (low + high)
    return (centre < joints.low) | (centre > joints.high)


def _hardly_moves(
    robot: RobotConfig,
    joints: Joints,
    feature: str,
    values: Range,
    ends: Array,
) -> Iterator[Finding]:
    """Detect radians that the file declares as degrees: `ends` (2, J) [rad] are all near 0."""
    largest = float(np.abs(ends).max())
    in_degrees = bool((np.abs(robot.arm.units.scale) < 0.1).all())
    if in_degrees and largest < 2.0 * math.pi * _DEGREE and joints.fit(*(ends / _DEGREE)):
        yield Finding(
            "arm.scale" if robot.arm.scale else "arm.unit",
            f"{feature} is within {largest:.3g} rad of 0 for all joints ({values.source})",
            "an arm in use moves further",
            "The data are in radians already: arm.unit: rad, or another arm.scale.",
            "units",
            PROBLEM if values.measured else WARNING,
        )


def _cause(
    robot: RobotConfig,
    joints: Joints,
    low: Array,
    high: Array,
    wrong: NDArray[np.bool_],
) -> tuple[str, str, str]:
    """Return the key that explains angles outside the limits, its rule's name and the remedy."""
    largest = float(np.maximum(np.abs(low), np.abs(high)).max())
    if largest > 2.0 * math.pi and joints.fit(low * _DEGREE, high * _DEGREE):
        key = "arm.scale" if robot.arm.scale else "arm.unit"
        return key, "units", "The data are in degrees: write arm.unit: deg."
    if largest > LARGEST_ANGLE:
        key = "arm.scale" if robot.arm.scale else "arm.unit"
        return key, "units", "The data are in another unit: correct arm.unit or arm.scale."
    limits = (
        "limits.position",
        "statistics",
        "Correct arm.offset, arm.sign, the order of arm.joints, or widen the limits.",
    )
    if not (wrong & _centre_outside(joints, low, high)).any():
        return limits
    places = np.arange(len(low))
    for one in np.flatnonzero(wrong):
        for other in places:
            order = places.copy()
            order[[one, other]] = order[[other, one]]
            if other != one and joints.fit(low[order], high[order]):
                names = f"{joints.names[one]} and {joints.names[other]}"
                return (
                    "arm.joints",
                    "statistics",
                    f"With {names} exchanged it fits: the order must be that of the dataset.",
                )
    offset = robot.arm.units.offset
    flipped_low = np.where(wrong, 2.0 * offset - high, low)
    flipped_high = np.where(wrong, 2.0 * offset - low, high)
    if joints.fit(flipped_low, flipped_high):
        return "arm.sign", "statistics", "With the opposite sign it fits: correct arm.sign."
    return limits


def _speeds(
    robot: RobotConfig,
    joints: Joints,
    feature: str,
    values: Range,
    dt: float,
) -> Iterator[Finding]:
    """Compare the data's velocities (or increments in `dt`) with the physical velocities."""
    scale = np.abs(robot.arm.units.scale)
    speed = scale * np.maximum(np.abs(values.low), np.abs(values.high)) / dt
    bound = np.minimum(2.0 * joints.physical_velocity, FASTEST)
    slow = np.array(robot.limits.velocity)
    if (speed > bound).any():
        joint, who = worst(joints.names, speed - bound)
        degrees = (speed * _DEGREE <= bound).all()
        yield Finding(
            "arm.scale" if robot.arm.scale else "arm.unit",
            f"{feature} of {who} needs {speed[joint]:.4g} rad/s by this file ({values.source})",
            f"the joint reaches {joints.physical_velocity[joint]:.4g} rad/s",
            (
                "The data may be in degrees: arm.unit: deg."
                if degrees
                else "Correct arm.unit, arm.scale, action.fps or the kind of action."
            ),
            "units",
            PROBLEM if values.measured else WARNING,
        )
    elif feature == ACTION and (speed > slow).any():
        joint, who = worst(joints.names, speed - slow)
        yield Finding(
            "limits.velocity",
            f"{feature} of {who} needs {speed[joint]:.4g} rad/s ({values.source})",
            f"the limit is {slow[joint]:.4g} rad/s",
            "The arm will lag behind the policy.",
            severity=WARNING,
        )


def _pose_steps(values: Range) -> Iterator[Finding]:
    """Compare `ee_delta` actions, shares of position_scale and rotation_scale, with [-1, 1]."""
    reach = float(np.maximum(np.abs(values.low), np.abs(values.high)).max())
    if 0.02 <= reach <= 1.5:
        return
    told = f"actions reach {reach:.3g} in the data ({values.source})"
    rule = "ee_delta takes shares of position_scale and rotation_scale from -1 to 1"
    refused = reach > 10.0 and values.measured
    yield Finding(
        "action.kind",
        told,
        rule,
        (
            "Larger actions are clipped, so every step would have full length."
            if reach > 1.0
            else "The arm will hardly move: the data may be in metres and radians."
        ),
        "statistics",
        PROBLEM if refused else WARNING,
    )


def _opening(gripper: Gripper, feature: str, values: Range) -> Iterator[Finding]:
    """Compare the data's openings, through the file's mapping, with `closed` and `open`."""
    first = gripper.policy.ours(values.low[0])
    last = gripper.policy.ours(values.high[0])
    low = min(first, last)
    high = max(first, last)
    stroke = gripper.open - gripper.closed
    slack = max(0.25 * stroke, 0.01)
    told = (
        f"{feature} of the gripper goes from {values.low[0]:.4g} to {values.high[0]:.4g} in the "
        f"data ({values.source}), which is {low:.4g} to {high:.4g} m by this file"
    )
    rule = f"it opens from {gripper.closed:g} to {gripper.open:g} m"
    middle = 0.5 * (low + high)
    beyond = max(abs(low), abs(high)) > WIDEST or not gripper.closed <= middle <= gripper.open
    severity = PROBLEM if beyond and values.measured else WARNING
    scale = stroke / max(values.high[0] - values.low[0], 1e-9)
    if beyond or low < gripper.closed - slack or high > gripper.open + slack:
        remedy = f"Give gripper.action_scale, metres per unit of the data: about {scale:.3g} here."
        yield Finding("gripper.action_scale", told, rule, remedy, "gripper", severity)
    elif high - low < 0.05 * stroke:
        remedy = "The gripper will hardly move; compare action_scale with the data's unit."
        yield Finding("gripper.action_scale", told, rule, remedy, severity=WARNING)


def _binary(values: Range) -> Iterator[Finding]:
    low = float(values.low[0])
    high = float(values.high[0])
    told = f"the last action goes from {low:.4g} to {high:.4g} in the data ({values.source})"
    if max(abs(low), abs(high)) > 2.0:
        yield Finding(
            "gripper.action",
            told,
            "binary takes values around -1 and 1, and opens above 0",
            "Write action: opening, and give action_scale.",
            "gripper",
            PROBLEM if values.measured else WARNING,
        )
    elif low > 0.0 or high <= 0.0:
        yield Finding(
            "gripper.action",
            told,
            "binary opens above 0 and closes otherwise",
            f"The gripper will {'never close' if low > 0.0 else 'never open'}.",
            severity=WARNING,
        )
