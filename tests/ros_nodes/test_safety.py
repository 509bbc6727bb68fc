"""No unsafe command leaves the filter for any input; every intervention has a name and a count."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.safety import MAX_DT, Hold, SafetyFilter, SafetyLimits

NAMES = ("shoulder", "elbow")
FRESH = {"joint_states": 0.01, "front": 0.05}
DT = 0.01


def limits(**changes: Any) -> SafetyLimits:
    values: dict[str, Any] = {
        "joint_names": NAMES,
        "position_low": [-1.0, -2.0],
        "position_high": [1.0, 2.0],
        "max_velocity": [1.0, 2.0],
        "max_step": [0.1, 0.2],
        "timeouts": {"joint_states": 0.2, "front": 0.5},
    }
    return SafetyLimits(**{**values, **changes})


def settle(safety: SafetyFilter, at: Any, end: float = 10.0) -> Hold | None:
    """Take agreeing joint states of the 0.25 s before `end`; return the fault of the pose then."""
    fault = None
    for step in range(-25, 1):
        fault = safety.measure(NAMES, at, end + 0.01 * step)
    return fault


def moving(at: tuple[float, float] = (0.0, 0.0), **changes: Any) -> SafetyFilter:
    """An enabled filter with the arm at a position, whose last joint state is of 10 s."""
    safety = SafetyFilter(limits(**changes))
    assert settle(safety, at) is None
    assert safety.enable(0.0) is None
    return safety


def test_a_restart_after_a_hold_keeps_the_grip_and_enable_forgets_it() -> None:
    safety = moving(gripper_low=0.0, gripper_high=0.1)
    ages = dict.fromkeys(FRESH, 0.01)
    safety.command(np.zeros(2), 0.0, dt=DT, ages=ages)
    assert safety.restart(0.0, resumed=True) is None
    assert safety.last_opening == 0.0
    assert safety.restart(0.0) is None
    assert safety.last_opening is None


# ---- the safety property -------------------------------------------------------------------------

anything = st.floats(allow_nan=True, allow_infinity=True)
number = st.floats(-3, 3)
messy = st.one_of(number, number, number, anything)
EVENTS = st.one_of(
    st.tuples(st.just("measure"), st.lists(messy, min_size=2, max_size=2)),
    st.tuples(st.just("measure"), st.lists(messy, max_size=3)),
    st.tuples(st.just("settle"), st.lists(number, min_size=2, max_size=2)),
    st.tuples(st.just("command"), st.lists(messy, min_size=2, max_size=2), messy, messy, messy),
    st.tuples(st.just("command"), st.lists(messy, max_size=3), messy, messy, messy),
    st.tuples(st.sampled_from(["enable", "enable", "disable", "estop", "reset"])),
)


class CheckedFilter:
    """A filter that takes events; every command that leaves it is checked."""

    def __init__(self) -> None:
        self.safety = SafetyFilter(limits())
        self.commands = 0
        self._now = 10.0
        self._last: np.ndarray | None = None  # command (J,) since the last `enable` [rad]
        self._gripper_set = False

    def live_through(self, kind: str, *values: Any) -> None:
        """Take one event of `EVENTS`."""
        self._now += 0.01
        if kind == "measure":
            names = NAMES[: len(values[0])] + ("other",) * (len(values[0]) - 2)
            self.safety.measure(names, values[0], self._now)
        elif kind == "settle":
            self._now += 0.3
            settle(self.safety, values[0], self._now)
        elif kind == "command":
            self._command(*values)
        elif kind == "enable":
            if self.safety.enable(0.0) is None:
                self._last = None
                self._gripper_set = False
        else:
            getattr(self.safety, kind)()

    def _command(self, positions: list[float], gripper: float, dt: float, age: float) -> None:
        ages = {"joint_states": age, "front": 0.0}
        decision = self.safety.command(np.array(positions), gripper, dt=dt, ages=ages)
        self.commands += 1
        self._gripper_set |= decision.hold is None
        assert (decision.gripper is not None) == self._gripper_set
        assert decision.gripper is None or 0 <= decision.gripper <= 0.1
        if not self.safety.enabled or self.safety.stopped or not age <= 0.2:
            assert decision.hold
        if decision.positions is None:
            assert decision.hold
            return
        self._check_positions(decision.positions, decision.hold, dt)
        self._last = decision.positions

    def _check_positions(self, sent: np.ndarray, hold: Hold | None, dt: float) -> None:
        bounds = self.safety.limits
        assert np.isfinite(sent).all()
        assert (sent >= bounds.position_low).all()
        assert (sent <= bounds.position_high).all()
        assert (np.abs(sent - self.safety.measured) <= bounds.max_step + 1e-6).all()
        if self._last is None:
            return
        reach = bounds.max_velocity * min(max(dt, 0), MAX_DT)
        assert (np.abs(sent - self._last) <= np.nan_to_num(reach) + 1e-8).all()
        if hold:
            assert np.array_equal(sent, self._last)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(events=st.lists(EVENTS, max_size=40))
def test_no_command_is_ever_unsafe(events: list[tuple[Any, ...]]) -> None:
    checked = CheckedFilter()
    for event in [("settle", [0.1, 0.2]), ("enable",), *events]:
        checked.live_through(*event)
    assert sum(checked.safety.holds.values()) <= checked.commands


# ---- single rules --------------------------------------------------------------------------------


def test_a_good_command_passes_unchanged() -> None:
    safety = moving()
    decision = safety.command(np.array([0.005, -0.01]), 0.04, dt=DT, ages=FRESH)
    assert decision.positions.tolist() == [0.005, -0.01]
    assert (decision.gripper, decision.hold, decision.clamped) == (0.04, None, ())
    assert not any(safety.clamps.values())
    assert not safety.holds


def test_each_clamp_is_named_and_counted() -> None:
    fast = {"max_velocity": [1e3, 1e3]}
    far = {"max_step": [9.0, 9.0]}
    cases = {
        "position": (moving((0.95, 0.0), **fast, **far), [1.3, 0.0], [1.0, 0.0]),
        "step": (moving((0.2, 0.0), **fast), [0.9, 0.0], [0.3, 0.0]),
        "velocity": (moving((0.2, 0.0), **far), [0.9, 0.0], [0.21, 0.0]),
    }
    for kind, (safety, wanted, sent) in cases.items():
        decision = safety.command(np.array(wanted), dt=DT, ages=FRESH)
        assert decision.positions == pytest.approx(sent), kind
        assert decision.clamped == (kind,)
        assert safety.clamps[kind] == 1
        assert decision.hold is None
    safety = moving()
    decision = safety.command(np.zeros(2), 0.3, dt=DT, ages=FRESH)
    assert (decision.gripper, decision.clamped, safety.clamps["gripper"]) == (0.1, ("gripper",), 1)


def test_an_arm_that_was_pushed_away_is_not_pulled_back() -> None:
    safety = moving()
    safety.command(np.zeros(2), dt=DT, ages=FRESH)
    for step in range(1, 20):  # by hand, 1 rad/s
        assert safety.measure(NAMES, [0.01 * step, 0.0], 10.0 + 0.01 * step) is None
    decision = safety.command(np.zeros(2), dt=DT, ages=FRESH)
    assert decision.hold.code == "displaced"
    assert "shoulder is at 0.19 rad, the last command at 0" in decision.hold.detail
    assert "limits.step (0.1)" in decision.hold.detail
    assert decision.positions is None
    hold = safety.command(None, dt=DT, ages=FRESH, hold=Hold("starved", ""))
    assert hold.positions is None  # nor does a hold repeat the command
    settle(safety, [0.19, 0.0], 10.5)
    assert safety.enable(0.0) is None
    decision = safety.command(np.array([0.19, 0.0]), dt=DT, ages=FRESH)
    assert decision.positions == pytest.approx([0.19, 0.0])


def test_an_arm_that_stays_behind_is_not_left() -> None:
    """Also with an acceleration limit, which would let the command run on."""
    safety = moving(max_acceleration=np.full(2, 1.0))
    for step in range(1, 100):
        safety.measure(NAMES, [0.0, 0.0], 10.0 + 1e-4 * step)
        decision = safety.command(np.array([0.9, 0.0]), dt=DT, ages=FRESH)
        assert decision.positions[0] <= 0.1 + 1e-9
    assert decision.positions[0] == pytest.approx(0.1)


def test_a_stall_of_the_sender_does_not_buy_a_larger_step() -> None:
    decision = moving(max_step=[9.0, 9.0]).command(np.array([1.0, 0.0]), dt=10.0, ages=FRESH)
    assert decision.positions == pytest.approx([0.05, 0.0])  # MAX_DT of 0.05 s


@pytest.mark.parametrize("acceleration", [None, np.full(2, 5.0)])
def test_a_measured_position_outside_the_limits_leads_back_inside(acceleration: Any) -> None:
    """From where the arm is, at limited speed, and never further outside."""
    safety = moving((1.08, 0.0), max_acceleration=acceleration)
    hold = Hold("waiting", "for the first chunk")
    assert safety.command(None, dt=DT, ages=FRESH, hold=hold).positions == pytest.approx([1.08, 0])
    last = 1.08
    for _ in range(40):
        positions = safety.command(np.array([1.2, 0.0]), dt=DT, ages=FRESH).positions
        assert positions is not None
        assert last - DT - 1e-9 <= positions[0] <= last  # 1 rad/s
        last = positions[0]
    assert last == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ages", "code", "detail"),
    [
        (
            {"joint_states": 0.3, "front": 0.0},
            "stale",
            "joint_states is 0.30 s old, the limit is 0.20 s",
        ),
        ({"joint_states": 0.0, "front": 0.6}, "stale", "front is 0.60 s old"),
        ({"joint_states": 0.0, "front": None}, "stale", "front never came"),
        ({"joint_states": 0.0}, "stale", "front never came"),
        ({"joint_states": math.nan, "front": 0.0}, "stale", "joint_states is nan"),
        ({"joint_states": -5.0, "front": 0.0}, "clock", "5.00 s in the future"),
    ],
)
def test_stale_inputs_hold_the_last_command(ages: dict[str, Any], code: str, detail: str) -> None:
    safety = moving()
    safety.command(np.array([0.01, 0.0]), 0.05, dt=DT, ages=FRESH)
    decision = safety.command(np.array([0.02, 0.0]), 0.0, dt=DT, ages=ages)
    assert (decision.positions.tolist(), decision.gripper) == ([0.01, 0.0], 0.05)
    assert decision.hold.code == code
    assert detail in decision.hold.detail
    assert safety.holds == {code: 1}
    # recovers by itself
    assert safety.command(np.array([0.02, 0.0]), dt=DT, ages=FRESH).hold is None


@pytest.mark.parametrize(
    ("names", "positions", "detail"),
    [
        (("shoulder", "wrist"), [0.0, 0.0], "lacks elbow; it has shoulder, wrist"),
        (NAMES, [0.0], "2 names and 1 positions"),
        (
            ("shoulder", "elbow", "elbow"),
            [0.0, 0.0, 0.1],
            "names a joint twice: shoulder, elbow, elbow",
        ),
        (NAMES, [0.0, math.nan], "positions are not finite: elbow nan"),
        ((), [], "lacks shoulder, elbow; it has no joints"),
    ],
)
def test_a_bad_joint_state_holds_until_a_good_one(names: Any, positions: Any, detail: str) -> None:
    safety = moving()
    safety.command(np.array([0.01, 0.0]), dt=DT, ages=FRESH)
    fault = safety.measure(names, positions, 10.01)
    assert fault.code == "bad_joint_states"
    assert detail in fault.detail
    decision = safety.command(np.array([0.02, 0.0]), dt=DT, ages=FRESH)
    assert decision.hold == fault
    assert decision.positions == pytest.approx([0.01, 0.0])
    assert safety.measure(("finger", "elbow", "shoulder"), [math.nan, 0.02, 0.01], 10.01) is None
    assert safety.measured.tolist() == [0.01, 0.02]  # by name
    assert safety.command(np.array([0.02, 0.0]), dt=DT, ages=FRESH).hold is None


@pytest.mark.parametrize(
    ("wanted", "gripper", "dt", "code"),
    [
        ([0.0, math.nan], None, DT, "not_finite"),
        ([0.0, math.inf], None, DT, "not_finite"),
        ([0.0, 0.0], math.nan, DT, "not_finite"),
        ([0.0], None, DT, "joint_set"),
        ([0.0, 0.0, 0.0], None, DT, "joint_set"),
        ([0.0, 0.0], None, 0.0, "clock"),
        ([0.0, 0.0], None, -1.0, "clock"),
    ],
)
def test_a_bad_command_holds(
    wanted: list[float], gripper: float | None, dt: float, code: str
) -> None:
    decision = moving((0.1, 0.1)).command(np.array(wanted), gripper, dt=dt, ages=FRESH)
    assert decision.hold.code == code
    assert decision.positions == pytest.approx([0.1, 0.1])


def test_the_callers_reason_holds_and_is_counted() -> None:
    safety = moving()
    decision = safety.command(None, dt=DT, ages=FRESH, hold=Hold("starved", "no chunk"))
    assert decision.hold == Hold("starved", "no chunk")
    assert safety.holds["starved"] == 1
    with pytest.raises(ConfigError, match="pass a reason"):
        safety.command(None, dt=DT, ages=FRESH)


def test_nothing_is_sent_before_the_pose_is_trusted() -> None:
    safety = SafetyFilter(limits())
    fault = safety.enable(0.0)
    assert fault.code == "no_joint_states"
    decision = safety.command(np.zeros(2), dt=DT, ages=FRESH)
    assert (decision.positions, decision.gripper) == (None, None)
    assert decision.hold is not None
    for step in range(21):
        assert safety.command(np.zeros(2), dt=DT, ages=FRESH).positions is None
        refused = safety.enable(0.0)
        assert refused.code == ("unsettled_pose" if step else "no_joint_states")
        safety.measure(NAMES, [0.3, 0.4], 10.0 + 0.01 * step)
    assert "the joint states agree for 0.19 s (20 states)" in refused.detail
    decision = safety.command(np.zeros(2), dt=DT, ages=FRESH)  # disabled: holds the pose
    assert decision.positions == pytest.approx([0.3, 0.4])
    assert decision.hold.code == "disabled"
    assert safety.enable(0.0) is None


def test_two_states_are_not_enough() -> None:
    safety = SafetyFilter(limits())
    safety.measure(NAMES, [0.3, 0.4], 10.0)
    safety.measure(NAMES, [0.3, 0.4], 10.2)
    assert safety.enable(0.0).code == "unsettled_pose"
    safety.measure(NAMES, [0.3, 0.4], 10.4)
    assert safety.enable(0.0) is None


def test_the_emergency_stop_is_latched_and_reset_does_not_start_motion() -> None:
    safety = moving()
    safety.command(np.array([0.01, 0.0]), dt=DT, ages=FRESH)
    safety.estop("operator")
    safety.estop("again")
    for _ in range(3):
        decision = safety.command(np.array([0.02, 0.0]), dt=DT, ages=FRESH)
        assert decision.hold.code == "estop"
        assert "operator" in decision.hold.detail
        assert decision.positions == pytest.approx([0.01, 0.0])
    refused = safety.enable(0.0)
    assert "reset it first" in refused.detail
    safety.reset()
    decision = safety.command(np.array([0.02, 0.0]), dt=DT, ages=FRESH)
    assert decision.hold.code == "disabled"
    assert safety.enable(0.0) is None
    assert safety.command(np.array([0.005, 0.0]), dt=DT, ages=FRESH).hold is None
    assert safety.holds == {"estop": 3, "disabled": 1}


def test_enabling_starts_from_where_the_arm_is() -> None:
    safety = moving()
    safety.command(np.zeros(2), dt=DT, ages=FRESH)
    safety.disable()
    for step in range(51):  # moved by hand
        safety.measure(NAMES, [0.01 * step, 0.01 * step], 10.0 + 0.02 * step)
    assert settle(safety, [0.5, 0.5], 11.27) is None
    assert safety.enable(0.0) is None
    decision = safety.command(np.array([0.505, 0.5]), dt=DT, ages=FRESH)
    assert decision.positions == pytest.approx([0.505, 0.5])
    assert decision.clamped == ()


def test_physical_velocities_have_a_default() -> None:
    assert limits().physical_velocity == pytest.approx([np.pi, np.pi])
    assert limits(max_velocity=[1.0, 9.0]).physical_velocity == pytest.approx([np.pi, 9.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint_names": ()}, "give every joint once"),
        ({"joint_names": ("a", "a")}, "give every joint once"),
        ({"position_low": [0.0]}, "position_low is .* one finite number for each"),
        ({"max_velocity": [1.0, math.inf]}, "max_velocity is"),
        ({"max_step": [0.1, 0.0]}, "max_step .* must be positive"),
        ({"physical_velocity": [0.1, 0.0]}, "physical_velocity .* must be positive"),
        ({"physical_velocity": [0.1]}, "physical_velocity is .* one finite number for each"),
        ({"position_low": [-1.0, 2.0]}, "lower position limit of elbow"),
        ({"timeouts": {"front": 1.0}}, "'joint_states' must have one"),
        ({"timeouts": {"joint_states": 0.0}}, "must be positive"),
        ({"gripper_low": 0.1}, "gripper limits"),
    ],
)
def test_bad_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits(**changes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(wanted=st.lists(st.floats(-3.0, 3.0), min_size=5, max_size=40), limit=st.floats(0.5, 20.0))
def test_commands_keep_the_acceleration_and_arrive(wanted: list[float], limit: float) -> None:
    safety = moving(max_acceleration=np.full(2, limit), max_step=[9.0, 9.0])
    path = [0.0]

    def go(target: float) -> None:
        decision = safety.command(np.array([target, 0.0]), dt=0.01, ages=FRESH)
        assert decision.hold is None
        path.append(float(decision.positions[0]))
        safety.measure(NAMES, decision.positions, 10.0 + 0.01 * len(path))

    for target in wanted:
        for _ in range(8):
            go(target)
    for _ in range(600):
        go(wanted[-1])
    speeds = np.diff(path) / 0.01
    assert np.abs(np.diff(speeds, prepend=0.0)).max() <= limit * 0.01 + 1e-9
    low, high = limits().position_low[0], limits().position_high[0]
    assert path[-1] == pytest.approx(np.clip(wanted[-1], low, high), abs=1e-3)
    assert np.abs(speeds).max() <= limits().max_velocity[0] + 1e-9
    assert max(path) <= max([*wanted, 0.0]) + 0.5 * limit * 0.01**2 + 1e-3  # it does not overshoot
