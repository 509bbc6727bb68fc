"""The states of the controller, and every way from one to another.

`TRANSITIONS` is the machine. `PolicyController` changes its state by it alone, the tests walk it,
and docs/robots.md shows it (`state_picture` writes that). Free of ROS and of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

# How long the last command is repeated while the arm's pose is unknown [s]. Nobody can move the arm
# by hand and restart it faster than this; afterwards it would leap back as its drives come on.
BLIND_HOLD = 5.0


class Worded(StrEnum):
    """A name, and what it means in words."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.meaning = meaning
        return member


class ControllerState(Worded):
    """What the last tick has sent, and so what the next one starts from.

    `mode.State` is what an operator sees: it is also true between two ticks.
    """

    SILENT = (
        "silent",
        "Nothing is sent: motion is not allowed, or the pose is not trusted. Motion restarts from "
        "the measured pose only.",
    )
    WAITING = (
        "waiting",
        "Commands repeat the pose until the first chunk comes; before that the policy must be "
        "loaded and the images be taken after motion was allowed.",
    )
    MOVING = ("moving", "Commands follow the policy's steps.")
    HOMING = ("homing", "Commands lead slowly to `arm.home`, without the policy.")
    HOLDING = (
        "holding",
        "Commands repeat the last one, because an input, the pose, the instruction or the policy "
        "is at fault, or the running chunk has ended.",
    )
    STOPPED = ("stopped", "The emergency stop is latched. Nothing is sent.")


class Event(Worded):
    """What changes the state; each event leads to one state, wherever it happens."""

    ESTOP = ("estop", "`~/estop` has latched the stop")
    RESET = ("reset", "`~/reset` has unlatched the stop")
    FORBID = (
        "forbid",
        "motion is not allowed: `~/enable` with false or a refused one, home is reached, an outage "
        "was longer than `resume_within`, the pose is another one, a driver restarted, or there is "
        "a conflict",
    )
    BLIND = ("blind", f"the pose has been unknown for more than {BLIND_HOLD:g} s")
    ELSEWHERE = (
        "elsewhere",
        "the arm is not where its commands hold it, or its pose has not settled",
    )
    RESTART = ("restart", "motion is allowed, and the pose is trusted and has settled")
    RESUME = ("resume", f"the pose is trusted again, after {BLIND_HOLD:g} s at most")
    ENABLE = ("enable", "`~/enable` or `~/go_home` is accepted while commands are sent")
    HOME = ("home", "`~/go_home` was accepted, and nothing is at fault")
    ACTION = ("action", "the running step has an action, and nothing is at fault")
    NO_CHUNK = (
        "no chunk",
        "nothing is at fault, but the first chunk, the policy or a new image is not there yet",
    )
    FAULT = (
        "fault",
        "an input, the pose, the instruction or the policy is at fault, or the running chunk has "
        "ended",
    )


@dataclass(frozen=True)
class Transition:
    """One row of the table."""

    state: ControllerState  # before
    event: Event
    next: ControllerState
    action: str  # what the controller does, in words


# In these every tick sends a command.
COMMANDING = (
    ControllerState.WAITING,
    ControllerState.MOVING,
    ControllerState.HOMING,
    ControllerState.HOLDING,
)


def _rows(
    states: Iterable[ControllerState], event: Event, to: ControllerState, action: str
) -> tuple[Transition, ...]:
    """The same row for several states."""
    return tuple(Transition(state, event, to, action) for state in states)


_SILENT, _STOPPED = (ControllerState.SILENT,), (ControllerState.STOPPED,)
_WAITING, _MOVING, _HOMING, _HOLDING = ((state,) for state in COMMANDING)
_LAST_ONCE_MORE = "drop all plans and send the last command once more"

TRANSITIONS: tuple[Transition, ...] = (
    *_rows(
        _SILENT,
        Event.RESTART,
        ControllerState.WAITING,
        "plan nothing; begin at the measured pose, and blend in from there",
    ),
    *_rows(_SILENT, Event.ESTOP, ControllerState.STOPPED, "send nothing"),
    *_rows(
        _STOPPED, Event.RESET, ControllerState.SILENT, "send nothing; motion needs `~/enable` too"
    ),
    *_rows(
        _WAITING + _HOLDING,
        Event.ACTION,
        ControllerState.MOVING,
        "send the command of the step",
    ),
    *_rows(_WAITING, Event.HOME, ControllerState.HOMING, "send the first command of the way home"),
    *_rows(
        _WAITING + _MOVING + _HOMING,
        Event.FAULT,
        ControllerState.HOLDING,
        "repeat the last command; drop all plans, unless the chunk has merely ended",
    ),
    *_rows(
        _MOVING + _HOLDING,
        Event.NO_CHUNK,
        ControllerState.WAITING,
        "repeat the last command and drop all plans; request a chunk as soon as one can be used",
    ),
    *_rows(
        _HOLDING,
        Event.RESUME,
        ControllerState.WAITING,
        "plan nothing; begin at the measured pose, and leave the gripper as it was told",
    ),
    *_rows(
        _MOVING + _HOMING + _HOLDING,
        Event.ENABLE,
        ControllerState.WAITING,
        "plan nothing; blend in from the measured pose",
    ),
    *_rows(COMMANDING, Event.ELSEWHERE, ControllerState.SILENT, "drop all plans and send nothing"),
    *_rows(_WAITING + _HOLDING, Event.BLIND, ControllerState.SILENT, _LAST_ONCE_MORE),
    *_rows(
        COMMANDING,
        Event.FORBID,
        ControllerState.SILENT,
        f"{_LAST_ONCE_MORE}, unless there is a conflict",
    ),
    *_rows(COMMANDING, Event.ESTOP, ControllerState.STOPPED, _LAST_ONCE_MORE),
)


class UndeclaredTransitionError(RuntimeError):
    """An event has happened in a state for which `TRANSITIONS` has no row."""


class StateMachine:
    """Holds the controller's state and changes it as `TRANSITIONS` says.

    Attributes:
        state: Silent at first.
        observers: Called with every transition, after it.
    """

    def __init__(self) -> None:
        self.state = ControllerState.SILENT
        self.observers: list[Callable[[Transition], None]] = []

    @property
    def commanding(self) -> bool:
        """Whether the last tick has sent a command, which the next one may follow."""
        return self.state in COMMANDING

    def take(self, event: Event) -> None:
        """Go where `event` leads; nothing changes if that is the present state.

        Raises:
            UndeclaredTransitionError: The table has no such row.
        """
        if _LEADS_TO[event] is self.state:
            return
        row = _TABLE.get((self.state, event))
        if row is None:
            raise UndeclaredTransitionError(
                f"The event {event!s} has happened in the state {self.state!s}; TRANSITIONS has it "
                f"in {', '.join(row.state for row in TRANSITIONS if row.event is event)} only."
            )
        self.state = row.next
        for observer in self.observers:
            observer(row)


_TABLE = {(row.state, row.event): row for row in TRANSITIONS}
_LEADS_TO = {row.event: row.next for row in TRANSITIONS}
