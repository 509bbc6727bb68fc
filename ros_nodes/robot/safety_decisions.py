"""Decisions of `SafetyFilter`: the command to send, or the reason for a hold."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.kinematics import Array

CLAMPS = ("position", "step", "velocity", "acceleration", "gripper")
# Codes of holds: the pose is not trusted yet; the pose changed while it was unknown; the arm left
# the last command.
UNSETTLED = "unsettled_pose"
MOVED = "moved_pose"
DISPLACED = "displaced"
SYNCHRONIZE = "Are the clocks of both computers synchronized (chrony, PTP)?"
NOT_ENABLED = "not enabled"  # reason while an operator has disabled motion


@dataclass(frozen=True)
class Hold:
    """The reason for a hold."""

    code: str  # docs/reference/holds.md explains each code; holds are counted by code
    detail: str  # for the operator, with values and limits


@dataclass(frozen=True)
class Decision:
    """What to send."""

    # (J,) [rad], always finite and inside the limits. None to send nothing: there was no command
    # yet and the pose is unknown, or repeating the last command could move the arm.
    positions: Array | None
    gripper: float | None  # opening [m]; None if it was not commanded since `SafetyFilter.enable`
    hold: Hold | None  # why this repeats the last command; None in normal motion
    clamped: tuple[str, ...] = ()  # names in `CLAMPS` of the limits that changed the request
