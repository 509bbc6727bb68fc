"""The controller's states and all transitions between them.

`TRANSITIONS` is the state machine: it alone changes the state of `PolicyController`, the tests walk
it, and docs/explanation/safety.md shows it (written by `state_picture`). Free of ROS and of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

# Time for which the last command is repeated while the arm's pose is unknown [s]. Nobody can move
# the arm by hand and restart it faster than this; after a longer time, the arm would leap back when
# its drives come on.
BLIND_HOLD = 5.0


class Worded(StrEnum):
    """A name with its meaning in words."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.meaning = meaning
        return member


class ControllerState(Worded):
    """What the last tick sent, and therefore what the next tick starts from.

    `mode.State` is the state that operators see; unlike this one, it is also valid between ticks.
    """

    SILENT = (
        "silent",
        "No command is sent: motion is not allowed, or the pose is not trusted. Motion restarts "
        "only from the measured pose.",
    )
    WAITING = (
        "waiting",
        "Commands repeat the pose until the first chunk arrives. The policy must be loaded first, "
        "and the images must be taken after motion was allowed.",
    )
    MOVING = ("moving", "Commands follow the policy's steps.")
    HOMING = ("homing", "Commands lead slowly to `arm.home`, without the policy.")
    GUIDED = ("guided", "Commands follow a person's device, without the policy.")
    HOLDING = (
        "holding",
        "Commands repeat the last one, because an input, the pose, the instruction, the policy or "
        "a person's device is at fault, or the running chunk has ended.",
    )
    STOPPED = ("stopped", "The emergency stop is latched. No command is sent.")


class Event(Worded):
    """What changes the state; each event leads to one state, from any state."""

    ESTOP = ("estop", "`~/estop` latched the stop")
    RESET = ("reset", "`~/reset` unlatched the stop")
    FORBID = (
        "forbid",
        "motion is not allowed: `~/enable` with false, a refused `~/enable`, arrival at home, an "
        "outage longer than `resume_within`, a changed pose, a restart of a driver, or a conflict",
    )
    BLIND = ("blind", f"the pose has been unknown for more than {BLIND_HOLD:g} s")
    ELSEWHERE = (
        "elsewhere",
        "the arm left the pose at which its commands hold it, or its pose has not settled",
    )
    RESTART = ("restart", "motion is allowed, and the pose is trusted and has settled")
    RESUME = ("resume", f"the pose is trusted again, after at most {BLIND_HOLD:g} s")
    ENABLE = ("enable", "`~/enable` or `~/go_home` is accepted while commands are sent")
    HOME = ("home", "`~/go_home` was accepted, and nothing is at fault")
    PERSON = ("person", "a person takes over, and the pose is not at fault")
    RELEASE = ("release", "the person gives back to the policy")
    ACTION = ("action", "the running step has an action, and nothing is at fault")
    NO_CHUNK = (
        "no chunk",
        "nothing is at fault, but the first chunk, the policy or a new image is missing",
    )
    FAULT = (
        "fault",
        "an input, the pose, the instruction, the policy or a person's device is at fault, or the "
        "running chunk has ended",
    )


@dataclass(frozen=True)
class Transition:
    """One row of the table."""

    state: ControllerState  # before the event
    event: Event
    next: ControllerState
    action: str  # of the controller, in words


# In these states, every tick sends a command.
COMMANDING = (
    ControllerState.WAITING,
    ControllerState.MOVING,
    ControllerState.HOMING,
    ControllerState.GUIDED,
    ControllerState.HOLDING,
)


def _rows(
    states: Iterable[ControllerState], event: Event, to: ControllerState, action: str
) -> tuple[Transition, ...]:
    """Return the same row for several states."""
    return tuple(Transition(state, event, to, action) for state in states)


_SILENT, _STOPPED = (ControllerState.SILENT,), (ControllerState.STOPPED,)
_WAITING, _MOVING, _HOMING, _GUIDED, _HOLDING = ((state,) for state in COMMANDING)
_LAST_ONCE_MORE = "drop all chunks and send the last command once more"

TRANSITIONS: tuple[Transition, ...] = (
    *_rows(
        _SILENT,
        Event.RESTART,
        ControllerState.WAITING,
        "begin at the measured pose without a chunk, and blend in from there",
    ),
    *_rows(_SILENT, Event.ESTOP, ControllerState.STOPPED, "send nothing"),
    *_rows(
        _STOPPED, Event.RESET, ControllerState.SILENT, "send nothing; motion also needs `~/enable`"
    ),
    *_rows(
        _WAITING + _HOLDING,
        Event.ACTION,
        ControllerState.MOVING,
        "send the command of the step",
    ),
    *_rows(_WAITING, Event.HOME, ControllerState.HOMING, "send the first command of the move home"),
    *_rows(
        _WAITING + _MOVING + _HOMING + _HOLDING,
        Event.PERSON,
        ControllerState.GUIDED,
        "drop all chunks and follow the person from the last command on",
    ),
    *_rows(
        _GUIDED,
        Event.RELEASE,
        ControllerState.WAITING,
        "begin at the last command without a chunk, and blend in from there",
    ),
    *_rows(
        _WAITING + _MOVING + _HOMING + _GUIDED,
        Event.FAULT,
        ControllerState.HOLDING,
        "repeat the last command; drop all chunks, unless the chunk has only ended",
    ),
    *_rows(
        _MOVING + _HOLDING,
        Event.NO_CHUNK,
        ControllerState.WAITING,
        "repeat the last command and drop all chunks; request a chunk as soon as one can be used",
    ),
    *_rows(
        _HOLDING,
        Event.RESUME,
        ControllerState.WAITING,
        "begin at the measured pose without a chunk; leave the gripper as commanded",
    ),
    *_rows(
        _MOVING + _HOMING + _GUIDED + _HOLDING,
        Event.ENABLE,
        ControllerState.WAITING,
        "drop all chunks; blend in from the last command if the arm moves, else the measured pose",
    ),
    *_rows(COMMANDING, Event.ELSEWHERE, ControllerState.SILENT, "drop all chunks and send nothing"),
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
    """An event occurred in a state for which `TRANSITIONS` has no row."""


class StateMachine:
    """Stores the controller's state and changes it according to `TRANSITIONS`.

    Attributes:
        state: The present state; silent at first.
        observers: Callbacks for every transition, called after it.
    """

    def __init__(self) -> None:
        self.state = ControllerState.SILENT
        self.observers: list[Callable[[Transition], None]] = []

    @property
    def commanding(self) -> bool:
        """Whether the last tick sent a command that the next command may follow."""
        return self.state in COMMANDING

    def take(self, event: Event) -> None:
        """Change to the state to which `event` leads; do nothing in that state.

        Raises:
            UndeclaredTransitionError: The table has no such row.
        """
        if _LEADS_TO[event] is self.state:
            return
        row = _TABLE.get((self.state, event))
        if row is None:
            raise UndeclaredTransitionError(
                f"The event {event!s} occurred in the state {self.state!s}; TRANSITIONS allows it "
                f"only in {', '.join(row.state for row in TRANSITIONS if row.event is event)}."
            )
        self.state = row.next
        for observer in self.observers:
            observer(row)


_TABLE = {(row.state, row.event): row for row in TRANSITIONS}
_LEADS_TO = {row.event: row.next for row in TRANSITIONS}
