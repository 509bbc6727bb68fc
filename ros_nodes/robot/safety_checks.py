"""Checks of single values: the age of an input, whether a command can be executed, and how far it
may go.
"""

from __future__ import annotations

import math

import numpy as np

from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.safety_decisions import DISPLACED, SYNCHRONIZE, Hold
from ceed_vla.ros_nodes.robot.safety_limits import SafetyLimits


def age_fault(limits: SafetyLimits, name: str, age: float | None) -> Hold | None:
    """Return why the input `name` cannot be used at this `age` [s]; None if it can be used.

    An `age` of None means that the input never arrived.
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
    """Return why a command cannot be executed; None if it can.

    Args:
        limits: Limits of the arm.
        wanted: Joint positions of the command, of any shape [rad].
        gripper: Opening [m]; None repeats the last one.
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
    """Return the nearest command to `wanted` within the position and step limits.

    Its distance from the last command exceeds what the velocity limit allows only if the arm was
    moved away from that command.

    Args:
        limits: Limits of the arm.
        wanted: Requested positions (J,) [rad].
        last: The last command (J,) [rad].
        measured: The last trusted pose (J,) [rad].
        speed: Velocity of the last command (J,) [rad/s].
        dt: Time since the last command [s].

    Returns:
        The command (J,) [rad], and the names in `CLAMPS` of the limits that changed it.
    """
    clamped = []
    reach = limits.max_velocity * dt
    step = limits.max_step if limits.commands_joints else np.full_like(limits.max_step, np.inf)
    # motion that started outside the position limits returns at limited speed
    lowest = np.maximum(np.minimum(limits.position_low, last), measured - step)
    highest = np.minimum(np.maximum(limits.position_high, last), measured + step)
    slowest = last - reach
    fastest = last + reach
    if limits.max_acceleration is not None:  # slow enough to stop at the target or the limits
        gain = limits.max_acceleration * dt
        inside = np.clip(wanted, limits.position_low, limits.position_high)
        way = np.clip(inside, lowest, highest) - last
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
    # Braking must not lead away from the measured position, and must not take a position that is
    # outside the limits further outside.
    return np.clip(wanted, lowest, highest), tuple(clamped)


def displaced(limits: SafetyLimits, last: Array, pose: Array) -> Hold:
    """Return the hold for an arm that was moved to `pose` (J,) [rad], away from the `last` command
    (J,) [rad].
    """
    way = np.abs(last - pose) - limits.max_step
    joint = int(way.argmax())
    return Hold(
        DISPLACED,
        f"{limits.joint_names[joint]} is at {pose[joint]:.4g} rad, the last command at "
        f"{last[joint]:.4g}, further than limits.step ({limits.max_step[joint]:.3g}); "
        "motion goes on from the pose",
    )
