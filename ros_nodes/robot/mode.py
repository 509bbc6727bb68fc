"""What a policy node tells operators at a moment: every answer, diagnostic and ``~/state`` is a
function of it. Free of ROS.

`controller_states` has the states that the control loop goes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ceed_vla.ros_nodes.robot.safety import Hold
from ceed_vla.ros_nodes.robot.texts import short

WAITING = "waiting"  # code of a hold: for the first chunk, or what it needs
STARVED = "starved"  # code of a hold: the chunk ended before the next one came
LOADING = "the policy is being loaded"
# Holds that are no fault of the robot or its inputs.
HARMLESS = (WAITING, STARVED, "disabled", "no_instruction", "bad_instruction")


class Mode(StrEnum):
    UNCONFIGURED = "unconfigured"  # no robot, no checkpoint
    INACTIVE = "inactive"  # configured; nothing is streamed
    DISABLED = "disabled"  # motion waits for ~/enable
    WAITING = "waiting"  # enabled; the policy's first chunk is not there yet
    MOVING = "moving"
    HOLDING = "holding"  # enabled, and something objects
    STOPPED = "stopped"  # by ~/estop, until ~/reset


@dataclass(frozen=True)
class State:
    """A mode and its reason."""

    mode: Mode
    code: str = ""  # of the hold
    detail: str = ""  # for a person, with values and limits

    @classmethod
    def of(cls, hold: Hold | None) -> State:
        """An active node's."""
        if hold is None:
            return cls(Mode.MOVING)
        codes = {WAITING: Mode.WAITING, "disabled": Mode.DISABLED, "estop": Mode.STOPPED}
        return cls(codes.get(hold.code, Mode.HOLDING), hold.code, hold.detail)

    @property
    def reason(self) -> str:
        return short(f"{self.code}: {self.detail}") if self.code else short(self.detail, 500)

    def __str__(self) -> str:
        reason = self.detail if self.code == self.mode else self.reason
        return f"{self.mode}: {reason}" if reason else str(self.mode)
