"""State that a policy node reports to operators; every service answer, diagnostic and ``~/state``
message is a function of it. Free of ROS.

`controller_states` has the states of the control loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ceed_vla.ros_nodes.robot.safety import Hold
from ceed_vla.texts import short

WAITING = "waiting"  # code of a hold: the first chunk, or what it needs, is missing
STARVED = "starved"  # code of a hold: the chunk ended before the next one arrived
LATE_CHUNK = "late_chunk"  # code of a hold: the answer came so late that it was dropped
POLICY_ERROR = "policy_error"  # code of a hold: the policy failed in a way that has no other code
ANSWER = "for the first chunk"  # detail of such a hold: the policy is loaded, and was asked
LOADING = "the policy is being loaded"
# Holds that are not a fault of the robot or its inputs.
HARMLESS = (WAITING, STARVED, "disabled", "no_instruction", "bad_instruction")


class Mode(StrEnum):
    UNCONFIGURED = "unconfigured"  # no robot, no checkpoint
    INACTIVE = "inactive"  # configured; nothing is streamed
    DISABLED = "disabled"  # motion is not allowed until ~/enable
    WAITING = "waiting"  # enabled; the policy's first chunk has not arrived
    MOVING = "moving"
    GUIDED = "guided"  # a person commands the arm
    HOLDING = "holding"  # enabled, but an objection holds the arm
    STOPPED = "stopped"  # by ~/estop, until ~/reset


@dataclass(frozen=True)
class State:
    """A mode and its reason."""

    mode: Mode
    code: str = ""  # of the hold
    detail: str = ""  # for the operator, with values and limits

    @classmethod
    def of(cls, hold: Hold | None) -> State:
        """Return the state of an active node with this hold."""
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
