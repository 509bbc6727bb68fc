"""What `SafetyFilter` decides: the command to send, or why the arm holds."""

from __future__ import annotations

from dataclasses import dataclass

from ceed_vla.kinematics import Array

CLAMPS = ("position", "step", "velocity", "acceleration", "gripper")
# Codes of holds: the pose is not trusted yet; it is another than before; the arm has left the last
# command.
UNSETTLED = "unsettled_pose"
MOVED = "moved_pose"
DISPLACED = "displaced"
SYNCHRONIZE = "Are the clocks of both computers synchronized (chrony, PTP)?"
NOT_ENABLED = "not enabled"  # why motion is disabled by an operator


@dataclass(frozen=True)
class Hold:
    """Why the arm holds."""

    code: str  # docs/robots.md explains each; holds are counted by it
    detail: str  # the same for a person, with values and limits


@dataclass(frozen=True)
class Decision:
    """What to send."""

    # (J,) [rad], always finite and inside the limits. None if there was no command yet and the pose
    # is unknown, or if repeating the last command could move the arm: send nothing then.
    positions: Array | None
    gripper: float | None  # opening [m]; None if it was not commanded since `SafetyFilter.enable`
    hold: Hold | None  # why this repeats the last command; None in normal motion
    clamped: tuple[str, ...] = ()  # which of `CLAMPS` changed what was asked for
