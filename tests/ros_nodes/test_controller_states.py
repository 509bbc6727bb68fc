"""The controller's states: every transition in the table occurs, no other does, and the docs show
the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rclpy.serialization import serialize_message

from ceed_vla.ros_nodes.robot import state_picture
from ceed_vla.ros_nodes.robot.controller_states import (
    COMMANDING,
    TRANSITIONS,
    ControllerState,
    Event,
    StateMachine,
    Transition,
    UndeclaredTransitionError,
)
from ceed_vla.ros_nodes.robot.messages import array_to_image
from tests.ros_nodes.loop import PIXELS, Loop, stamp

# Modes on `policy/state` after a tick that ends in a state.
SHOWN = {
    ControllerState.SILENT: {"disabled", "holding"},
    ControllerState.WAITING: {"waiting"},
    ControllerState.MOVING: {"moving"},
    ControllerState.HOMING: {"moving", "disabled"},  # the command that reaches home disables
    ControllerState.GUIDED: {"guided"},
    ControllerState.HOLDING: {"holding"},
    ControllerState.STOPPED: {"stopped"},
}


def by_hand(loop: Loop) -> None:
    """Move both joints by hand by 0.6 rad, at 1 rad/s, while the arm does not follow commands."""
    loop.follows = False
    for _ in range(60):
        loop.position = loop.position + 0.01
        loop.run(0.0105)  # always one tick, because ticks are up to 2 % late
    loop.follows = True


def recorded(loop: Loop) -> list[Transition]:
    """Return a list that collects the transitions of a loop from now on."""
    seen: list[Transition] = []
    loop.controller.machine.observers.append(seen.append)
    return seen


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_has_each_state_and_event_once_and_an_event_leads_to_one_state() -> None:
    assert len({(row.state, row.event) for row in TRANSITIONS}) == len(TRANSITIONS)
    assert {row.event for row in TRANSITIONS} == set(Event)
    assert {row.state for row in TRANSITIONS} == set(ControllerState)
    for event in Event:
        assert len({row.next for row in TRANSITIONS if row.event is event}) == 1, event
    assert all(row.state is not row.next for row in TRANSITIONS)


def test_whatever_sends_commands_can_be_stopped_and_forbidden() -> None:
    for state in COMMANDING:
        events = {row.event for row in TRANSITIONS if row.state is state}
        assert {Event.ESTOP, Event.FORBID, Event.ELSEWHERE} <= events


def test_an_undeclared_transition_raises() -> None:
    machine = StateMachine()
    machine.take(Event.FORBID)  # it is silent already
    with pytest.raises(UndeclaredTransitionError, match="action occurred in the state silent"):
        machine.take(Event.ACTION)
    assert machine.state is ControllerState.SILENT


# ---- every row happens ---------------------------------------------------------------------------


def silent() -> Loop:
    loop = Loop(step=0.3, enable=False)
    loop.run(0.1)
    return loop


def stopped() -> Loop:
    loop = silent()
    loop.controller.estop("operator")
    loop.run(0.1)
    return loop


def waiting() -> Loop:
    loop = Loop(step=0.3)
    loop.policy.delay = 1.0
    loop.run(0.2)
    return loop


def moving() -> Loop:
    loop = Loop(step=0.3)
    loop.run(1.0)
    return loop


def homing() -> Loop:
    loop = moving()
    assert loop.controller.enable(loop.now, home=(1.0, 0.5)) is None
    loop.run(0.2)
    return loop


def guided() -> Loop:
    loop = moving()
    take_over(loop)
    return loop


def holding() -> Loop:
    loop = moving()
    loop.cameras = False
    loop.run(0.5)
    return loop


def starved() -> Loop:
    loop = moving()
    loop.policy.delay = 3.0
    loop.run(2.0)
    return loop


def blind(seconds: float = 1.0) -> Loop:
    """Holding, because joint states are missing."""
    loop = moving()
    loop.controller.outage.within = 60.0
    loop.states = False
    loop.run(seconds)
    return loop


def just_enabled() -> Loop:
    """Waiting, after a hold without joint states that lasted nearly 5 s."""
    loop = blind(4.9)
    loop.states = True
    loop.settle()
    loop.states = False
    assert loop.controller.enable(loop.now) is None
    return loop


REACH: dict[ControllerState, Callable[[], Loop]] = {
    ControllerState.SILENT: silent,
    ControllerState.STOPPED: stopped,
    ControllerState.WAITING: waiting,
    ControllerState.MOVING: moving,
    ControllerState.HOMING: homing,
    ControllerState.GUIDED: guided,
    ControllerState.HOLDING: holding,
}
# Events that need another history than their state usually has.
REACH_FOR: dict[tuple[ControllerState, Event], Callable[[], Loop]] = {
    (ControllerState.HOLDING, Event.ACTION): starved,
    (ControllerState.HOLDING, Event.RESUME): blind,
    (ControllerState.HOLDING, Event.BLIND): blind,
    (ControllerState.WAITING, Event.BLIND): just_enabled,
}


def estop(loop: Loop) -> None:
    loop.controller.estop("operator")
    loop.run(0.05)


def reset(loop: Loop) -> None:
    loop.controller.reset()
    loop.run(0.05)


def forbid(loop: Loop) -> None:
    loop.controller.disable()
    loop.run(0.05)


def lose_sight(loop: Loop) -> None:
    """Send no good joint state for a total of 5 s."""
    if loop.controller.machine.state is ControllerState.WAITING:
        loop.safety.measure(["shoulder"], [1.0], loop.now)  # a state without the elbow
        loop.controller.tick(loop.now + 0.5, loop.now + 0.5)
    else:
        loop.run(5.0)


def push(loop: Loop) -> None:
    """Move the arm by hand faster than commands follow."""
    loop.safety.limits = replace(loop.safety.limits, max_velocity=np.full(2, 0.1))
    by_hand(loop)


def allow(loop: Loop) -> None:
    assert loop.controller.enable(loop.now) is None
    loop.run(0.05)


def resume(loop: Loop) -> None:
    loop.states = True
    loop.run(0.5)


def go_home(loop: Loop) -> None:
    assert loop.controller.enable(loop.now, home=(1.0, 0.5)) is None
    loop.run(0.05)


def wait_for_answers(loop: Loop) -> None:
    loop.run(3.0)


def lose_the_chunk(loop: Loop) -> None:
    """Make the newest image older than the permission to move, or restore images after a hold."""
    if loop.controller.machine.state is ControllerState.MOVING:
        assert loop.controller.enable(loop.now) is None
        taken = loop.now - 0.001
        loop.run(0.2)
        assert loop.controller.machine.state is ControllerState.MOVING
        old = array_to_image(PIXELS, stamp(taken), "camera")
        loop.observations.cameras[0].take(serialize_message(old))
    loop.cameras = True
    loop.run(0.05)


def fail(loop: Loop) -> None:
    loop.states = False
    loop.run(0.5)


def take_over(loop: Loop) -> None:
    """Let a person take over with an aligned leader arm."""
    loop.leader = loop.position.copy()
    loop.hand = True
    loop.run(0.05)


def let_go(loop: Loop) -> None:
    loop.hand = False
    loop.run(0.3)


CAUSE: dict[Event, Callable[[Loop], None]] = {
    Event.ESTOP: estop,
    Event.RESET: reset,
    Event.FORBID: forbid,
    Event.BLIND: lose_sight,
    Event.ELSEWHERE: push,
    Event.RESTART: allow,
    Event.RESUME: resume,
    Event.ENABLE: allow,
    Event.HOME: go_home,
    Event.PERSON: take_over,
    Event.RELEASE: let_go,
    Event.ACTION: wait_for_answers,
    Event.NO_CHUNK: lose_the_chunk,
    Event.FAULT: fail,
}


@pytest.mark.parametrize("row", TRANSITIONS, ids=lambda row: f"{row.state}-{row.event}")
def test_every_row_happens(row: Transition) -> None:
    reach = REACH_FOR.get((row.state, row.event), REACH[row.state])
    loop = reach()
    assert loop.controller.machine.state is row.state
    seen = recorded(loop)
    CAUSE[row.event](loop)
    assert row in seen


# ---- no other transition occurs ------------------------------------------------------------------


class Watched(Loop):
    """A loop that compares the state after every tick with the command and the shown state."""

    def __init__(self) -> None:
        super().__init__(step=0.3)
        self.seen = recorded(self)
        tick = self.controller.tick

        def watched(now: float, clock: float) -> object:
            decision = tick(now, clock)
            state = self.controller.machine.state
            assert self.controller.state.mode in SHOWN[state], (state, self.controller.state)
            if state in COMMANDING:
                assert decision is not None
                assert (decision.hold is None) == (
                    state
                    in (ControllerState.MOVING, ControllerState.HOMING, ControllerState.GUIDED)
                )
            else:  # nothing, or the last command once more
                assert decision is None or decision.hold is not None
            return decision

        self.controller.tick = watched  # type: ignore[method-assign, assignment]

    def jump(self, back: float) -> None:
        """Set the clock back for one tick."""
        self.controller.tick(self.now - back, self.now - back)
        self.controller.after_tick(self.now)


OPERATE: dict[str, Callable[[Watched], object]] = {
    "enable": lambda loop: loop.controller.enable(loop.now),
    "insist": lambda loop: loop.controller.enable(loop.now, insist=True),
    "home": lambda loop: loop.controller.enable(loop.now, home=(0.2, 0.1)),
    "disable": lambda loop: loop.controller.disable(),
    "estop": lambda loop: loop.controller.estop("operator"),
    "reset": lambda loop: loop.controller.reset(),
    "conflict": lambda loop: loop.controller.note_conflict("another node"),
    "no conflict": lambda loop: loop.controller.note_conflict(None),
    "restarted": lambda loop: loop.controller.interrupt("the driver restarted"),
    "end": lambda loop: loop.controller.end(loop.now),
    "images": lambda loop: setattr(loop, "cameras", not loop.cameras),
    "states": lambda loop: setattr(loop, "states", not loop.states),
    "slow": lambda loop: setattr(loop.policy, "delay", 1.5),
    "fast": lambda loop: setattr(loop.policy, "delay", 0.02),
    "dies": lambda loop: setattr(loop.policy, "failed", "The inference process ended."),
    "lives": lambda loop: setattr(loop.policy, "failed", None),
    "no instruction": lambda loop: loop.stream.instruct(""),
    "instruction": lambda loop: loop.stream.instruct("climb"),
    "hand": lambda loop: by_hand(loop),
    "clock": lambda loop: loop.jump(0.5),
    "take over": take_over,
    "let go": let_go,
    "leader away": lambda loop: setattr(loop, "leader", np.array([4.0, 4.0])),
    "leader silent": lambda loop: setattr(loop, "leader", None),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(sorted(OPERATE)), st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0, 6.0])
        ),
        max_size=16,
    )
)
def test_whatever_happens_is_in_the_table_and_shown(steps: list[tuple[str, float]]) -> None:
    loop = Watched()
    for what, seconds in steps:
        OPERATE[what](loop)
        loop.run(seconds)
    assert set(loop.seen) <= set(TRANSITIONS)
    before = ControllerState.SILENT
    for row in loop.seen:
        assert row.state is before
        before = row.next
    assert loop.controller.machine.state is before


def test_only_the_stream_moves_the_step_grid() -> None:
    for path in (state_picture.ROOT / "ros_nodes" / "robot").glob("*.py"):
        moved = re.findall(
            r"grid\.(?:count|begin_now|begin_step|delay|align|images)\b", path.read_text()
        )
        assert not moved or path.name == "policy_stream.py", path.name


# ---- the docs show the table ---------------------------------------------------------------------


def test_picture_and_page_show_the_table() -> None:
    written = f"rewrite them by `{state_picture.COMMAND}`"
    picture = state_picture.PICTURE.read_text(encoding="utf-8")
    page = state_picture.PAGE.read_text(encoding="utf-8")
    assert picture == state_picture.picture(), written
    assert page == state_picture.with_section(page), written


def test_a_page_without_the_section_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the heading"):
        state_picture.with_section("# Robots\n")


@pytest.mark.slow
def test_controller_and_picture_need_no_torch() -> None:
    script = (
        "import sys\n"
        "import ceed_vla.ros_nodes.robot.controller, ceed_vla.ros_nodes.robot.state_picture\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr
