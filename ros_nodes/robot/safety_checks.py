"""Checks of one value each: how old an input is, whether a command can be executed at all, how far
it may go.
"""

from __future__ import annotations

import math

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.safety_decisions import DISPLACED, SYNCHRONIZE, Hold
from ceed_vla.ros_nodes.robot.safety_limits import SafetyLimits


def age_fault(limits: SafetyLimits, name: str, age: float | None) -> Hold | None:
    """Why the input `name` cannot be used at this `age` [s], None if it never came; None if it
    can.
    """
    limit = limits.timeouts[name]
    if age is None:
        return Hold("stale", f"{name} never came")
    if not age <= limit:  # NaN too
        return Hold("stale", f"{name} is {age:.2f} s old, the limit is {limit:.2f} s")
    if age < -limit:
        detail = f"{name} lies {-age:.2f} s in the future, the limit is {limit:.2f} s"
        return Hold("clock", f"{detail}; did the clock go back? {SYNCHRONIZE}")
    return None


def command_fault(
    limits: SafetyLimits, wanted: Array, gripper: float | None, dt: float
) -> Hold | None:
    """Why a command cannot be executed; None if it can.

    Args:
        limits: Of the arm.
        wanted: Joint positions of the command, of any shape [rad].
        gripper: Opening [m]; None keeps the last one.
        dt: Time since the last command [s].
    """
    if not dt > 0:  # NaN too
        return Hold("clock", f"{dt} s passed since the last command; did the clock go back?")
    joints = len(limits.joint_names)
    if wanted.shape != (joints,):
        return Hold("joint_set", f"a command of shape {wanted.shape} for {joints} joints")
    if not np.isfinite(wanted).all() or not math.isfinite(gripper or 0.0):
        return Hold("not_finite", f"the command is {wanted.tolist()}, gripper {gripper}")
    return None


def clamp(
    limits: SafetyLimits, wanted: Array, *, last: Array, measured: Array, speed: Array, dt: float
) -> tuple[Array, tuple[str, ...]]:
    """The nearest command to `wanted` within position and step limits.

    It is further from the last command than the velocity allows only where the arm was moved away
    from that command.

    Args:
        limits: Of the arm.
        wanted: (J,) [rad].
        last: The last command (J,) [rad].
        measured: The last trusted pose (J,) [rad].
        speed: Of the last command (J,) [rad/s].
        dt: Time since the last command [s].

    Returns:
        The command (J,) [rad], and which of `CLAMPS` changed it.
    """
    clamped = []
    reach = limits.max_velocity * dt
    step = limits.max_step if limits.commands_joints else np.full_like(limits.max_step, np.inf)
    lowest = np.maximum(limits.position_low, measured - step)
    highest = np.minimum(limits.position_high, measured + step)
    slowest = last - reach
    fastest = last + reach
    if limits.max_acceleration is not None:  # never faster than what can stop where it must
        gain = limits.max_acceleration * dt
        way = np.clip(wanted, lowest, highest) - last
        stop = np.sqrt(gain**2 + 2.0 * limits.max_acceleration * np.abs(way)) - gain
        slowest = last + dt * np.minimum(np.maximum(speed - gain, -stop), speed + gain)
        fastest = last + dt * np.maximum(np.minimum(speed + gain, stop), speed - gain)
    for kind, low, high in (
        ("position", limits.position_low, limits.position_high),
        ("step", measured - step, measured + step),
        ("velocity", last - reach, last + reach),
        ("acceleration", slowest, fastest),
    ):
        inside = np.clip(wanted, low, high)
        if not np.array_equal(inside, wanted):
            clamped.append(kind)
        wanted = inside
    # Braking must not lead away from the measured position, nor a position outside the limits out
    # of them.
    return np.clip(wanted, lowest, highest), tuple(clamped)


def displaced(limits: SafetyLimits, last: Array, pose: Array) -> Hold:
    """The hold of an arm that something else has moved to `pose` (J,) [rad], away from the `last`
    command (J,) [rad].
    """
    way = np.abs(last - pose) - limits.max_step
    joint = int(way.argmax())
    return Hold(
        DISPLACED,
        f"{limits.joint_names[joint]} is at {pose[joint]:.4g} rad, the last command at "
        f"{last[joint]:.4g}, further than limits.step ({limits.max_step[joint]:.3g}); "
        "motion goes on from the pose",
    )
