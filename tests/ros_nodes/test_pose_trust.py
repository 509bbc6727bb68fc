"""Which joint states are trusted as the arm's pose, and what happens after untrusted ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ceed_vla.ros_nodes.robot.safety import SafetyFilter
from tests.ros_nodes.test_safety import DT, FRESH, NAMES, limits, moving, settle


@pytest.mark.parametrize(
    ("age", "detail"),
    [
        (0.21, "joint_states is 0.21 s old, the limit is 0.20 s"),
        (1e9, "joint_states is 1000000000.00 s old"),
        (math.nan, "joint_states is nan"),
        (None, "joint_states never came"),
        (-0.3, "joint_states lies 0.30 s in the future, the limit is 0.20 s"),
    ],
)
def test_motion_is_not_enabled_from_a_pose_of_another_time(age: float | None, detail: str) -> None:
    safety = SafetyFilter(limits())
    settle(safety, (0.1, 0.1))
    for enable in (safety.enable, safety.restart):
        refused = enable(age)
        assert refused.code == "stale"
        assert detail in refused.detail
    assert not safety.enabled
    late = {"joint_states": age, "front": 0.0}
    assert safety.command(np.zeros(2), dt=DT, ages=late).positions is None  # not even a hold
    assert safety.enable(0.2) is None


def test_a_pose_that_ages_between_enable_and_the_first_command_is_not_taken_later() -> None:
    safety = moving((0.1, 0.1))
    safety.measure(NAMES, (0.15, 0.1), 10.1)
    late = {"joint_states": 0.3, "front": 0.0}
    assert safety.command(np.zeros(2), dt=DT, ages=late).positions == pytest.approx([0.1, 0.1])


def watching(velocity: float = 1.0, step: float = 0.2) -> SafetyFilter:
    """An enabled filter that measured the arm at 0 up to 10 s."""
    velocities = [velocity, velocity]
    safety = SafetyFilter(limits(physical_velocity=velocities, max_step=[step, step]))
    assert settle(safety, (0.0, 0.0)) is None
    assert safety.enable(0.0) is None
    return safety


@pytest.mark.parametrize(
    ("at", "stamp", "detail"),
    [
        (
            (0.08, 0.0),
            10.01,
            "shoulder went from 0 to 0.08 rad in 0.010 s; it moves at most 1 rad/s",
        ),
        ((0.06, 0.0), 10.0, "in 0.000 s"),  # two states with one stamp
        ((0.06, 0.0), 9.999, "shoulder went"),  # a late state
        ((0.0, -1.0), 10.2, "elbow went from 0 to -1 rad"),
        ((1.11, 0.0), 99.0, "shoulder is at 1.11 rad, 0.11 outside its limits [-1, 1]"),
        ((0.0, 1e308), 10.01, "elbow is at 1e+308 rad"),
    ],
)
def test_joint_states_that_cannot_be_true_hold_until_enable(
    at: tuple[float, float], stamp: float, detail: str
) -> None:
    safety = watching()
    safety.command(np.array([0.01, 0.0]), dt=DT, ages=FRESH)
    fault = safety.measure(NAMES, at, stamp)
    assert fault.code == "implausible_joint_states"
    assert detail in fault.detail
    assert settle(safety, (0.02, 0.0), stamp + 1.0) == fault  # good states do not clear it, ...
    decision = safety.command(np.array([0.5, 0.0]), dt=DT, ages=FRESH)
    assert decision.hold == fault
    assert decision.positions == pytest.approx([0.01, 0.0])
    assert safety.restart(0.0) == fault  # ... nor does a restart without an operator
    assert safety.enable(0.5) is not None  # nor does a refused `enable`
    assert safety.restart(0.0) == fault
    assert safety.enable(0.0) is None
    sent = safety.command(np.array([0.025, 0.0]), dt=DT, ages=FRESH).positions
    assert sent == pytest.approx([0.025, 0.0])


@pytest.mark.parametrize(
    "states",
    [
        pytest.param([(0.049, 10.0), (0.0, 10.0), (0.049, 10.0)], id="noise in equal stamps"),
        pytest.param(
            [(0.02 * (-1) ** i, 10.0 + 1e-3 * i) for i in range(1, 50)], id="1 kHz with noise"
        ),
        pytest.param([(0.02, 10.02), (0.01, 10.01), (0.03, 10.03)], id="out of order"),
        pytest.param(
            [(0.0199 * i, 10.0 + 0.01 * i) for i in range(1, 50)], id="twice its velocity"
        ),
        pytest.param([(0.1 * i, 10.0 + 0.1 * i) for i in range(1, 10)], id="10 Hz"),
    ],
)
def test_what_arms_do_is_plausible(states: list[tuple[float, float]]) -> None:
    safety = watching()
    for position, stamp in states:
        assert safety.measure(NAMES, (position, 0.0), stamp) is None


@pytest.mark.parametrize(
    "states",
    [
        pytest.param([(0.9, 11.0)], id="after a pause"),
        pytest.param([(0.9, 0.5), (0.91, 0.51), (0.92, 0.52)], id="the clock went back"),
        pytest.param([(0.9, 0.0)] * 50, id="stamp 0"),
        pytest.param([(0.0, 10.3 + 0.21 * i) for i in range(50)], id="too rare"),
    ],
)
def test_what_may_be_true_is_not_trusted_at_once(states: list[tuple[float, float]]) -> None:
    safety = watching()
    for position, stamp in states:
        fault = safety.measure(NAMES, (position, 0.0), stamp)
    assert fault.code == "unsettled_pose"
    assert safety.measured == pytest.approx([0.0, 0.0])
    assert safety.command(np.zeros(2), dt=DT, ages=FRESH).hold == fault


def test_another_pose_than_before_is_accepted_by_reset_and_enable_alone() -> None:
    safety = watching()
    fault = settle(safety, (0.9, 0.0), 20.0)
    assert fault.code == "moved_pose"
    assert "shoulder is at 0.9 rad, the last trusted pose has it at 0" in fault.detail
    for _ in range(3):
        assert safety.enable(0.0) == fault
        assert safety.restart(0.0) == fault
    assert safety.command(np.array([0.9, 0.0]), dt=DT, ages=FRESH).positions is None
    assert safety.measured == pytest.approx([0.0, 0.0])
    assert "shoulder is at 0.9 rad" in safety.reset()
    assert safety.enable(0.0) is None
    sent = safety.command(np.array([0.9, 0.0]), dt=DT, ages=FRESH).positions
    assert sent == pytest.approx([0.9, 0.0])
    assert settle(safety, (0.0, 0.0), 30.0).code == "moved_pose"  # `reset` accepts one pose only


def test_a_pose_that_was_wrong_at_reset_is_not_accepted_later() -> None:
    safety = watching()
    settle(safety, (0.9, 0.0), 20.0)
    safety.reset()
    assert settle(safety, (0.0, 0.0), 30.0).code == "moved_pose"
    assert safety.enable(0.0).code == "moved_pose"


def test_a_reset_in_motion_changes_nothing() -> None:
    safety = watching(velocity=9.0)
    for step in range(1, 40):  # faster than `limits.step` in 0.2 s
        assert safety.measure(NAMES, (0.02 * step, 0.0), 10.0 + 0.01 * step) is None
        assert safety.reset() == ""
    assert safety.enable(0.0, moving=True) is None
    refused = safety.enable(0.0)
    assert refused.code == "unsettled_pose"
    assert "shoulder moves too fast to start" in refused.detail


def test_two_that_publish_poses_near_each_other_start_nothing_far_from_either() -> None:
    safety = SafetyFilter(limits(physical_velocity=[9.0, 9.0], max_step=[0.1, 0.1]))
    for step in range(100):
        safety.measure(NAMES, (0.15 * (step % 2), 0.0), 10.0 + 0.01 * step)
    assert safety.enable(0.0).code == "unsettled_pose"


def test_while_disabled_jumps_are_not_latched_but_not_trusted_either() -> None:
    safety = watching()
    safety.disable()
    fault = safety.measure(NAMES, (0.9, 0.9), 10.01)  # a simulation was reset
    assert fault.code == "unsettled_pose"
    fault = safety.measure(NAMES, (0.9, 50.0), 10.02)
    assert fault is not None
    refused = safety.enable(0.0)
    assert refused.code == "implausible_joint_states"
    assert settle(safety, (-0.9, 0.9), 10.5).code == "moved_pose"
    safety.reset()
    assert safety.enable(0.0) is None
    safety.estop("operator")
    assert safety.measure(NAMES, (0.9, 0.9), 10.51).code == "unsettled_pose"
    safety.reset()  # before the pose has settled: it accepts the pose that settles next
    assert safety.enable(0.0).code == "unsettled_pose"
    assert settle(safety, (0.9, 0.9), 10.9) is None
    assert safety.enable(0.0) is None
