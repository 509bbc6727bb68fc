"""Where motion starts and restarts, and when an operator must allow it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.ros_nodes.robot.controller import UNNAMED
from ceed_vla.ros_nodes.robot.safety import SafetyFilter
from tests.ros_nodes.loop import Loop
from tests.ros_nodes.test_controller_holds import hold_code, sent_since


def test_enable_waits_for_fresh_joint_states_and_starts_from_them() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.controller.disable()
    loop.run(0.1)
    loop.states = False
    loop.run(0.5)
    loop.position = np.array([0.7, -0.4])  # moved by hand, without joint states
    refused = loop.controller.enable(loop.now)
    assert refused.code == "stale"
    assert "joint_states is 0.5" in refused.detail
    assert "the limit is 0.20 s" in refused.detail
    count = len(loop.sent)
    loop.run(0.3)
    assert not sent_since(loop, count)
    loop.controller.enable(loop.now, insist=True)
    loop.run(0.3)
    assert not sent_since(loop, count)
    assert hold_code(loop) == "stale"
    loop.states = True
    loop.run(0.5)
    assert loop.controller.hold is None
    first, *rest = sent_since(loop, count)
    np.testing.assert_array_equal(first, [0.7, -0.4])
    assert rest


def test_without_joint_states_an_enabled_start_says_so_and_sends_nothing() -> None:
    loop = Loop(enable=False)
    loop.safety = loop.controller._safety = SafetyFilter(loop.safety.limits)
    loop.observations.forget()
    loop.states = False
    loop.controller.enable(loop.now, insist=True)
    loop.run(0.3)
    assert hold_code(loop) == "no_joint_states"
    assert not sent_since(loop, 0)
    loop.states, loop.position = True, np.array([0.3, 0.3])
    loop.run(0.3)
    np.testing.assert_array_equal(sent_since(loop, 0)[0], [0.3, 0.3])


def by_hand(loop: Loop, way: float) -> None:
    """Move both joints by hand, at 1 rad/s."""
    for _ in range(round(way / 0.01)):
        loop.position = loop.position + 0.01
        loop.run(0.0101)


@pytest.mark.parametrize("pause", [0.5, 4.0])
def test_after_a_hold_without_joint_states_another_pose_needs_an_operator(pause: float) -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.states = loop.follows = False
    loop.run(pause)
    assert hold_code(loop) == "stale"
    held = loop.path[-1]
    loop.position = held + [0.5, -0.5]  # moved by hand, without joint states
    loop.states = True
    loop.run(0.02)
    count = len(loop.sent)
    loop.run(1.0)
    assert not sent_since(loop, count)
    state = loop.controller.state
    assert state.mode == "disabled"
    assert "moved_pose: shoulder is at 0.7" in state.detail
    refused = loop.controller.enable(loop.now)
    assert refused.code == "moved_pose"
    assert "the last trusted pose has it at 0.1" in refused.detail
    assert "further than limits.step (0.3)" in refused.detail
    assert "~/reset" in refused.detail
    loop.run(1.0)
    assert not sent_since(loop, count)  # a refused `enable` is not remembered
    assert "shoulder is at" in loop.controller.reset()
    loop.run(1.0)
    assert not sent_since(loop, count)  # `reset` alone starts nothing
    loop.follows = True
    assert loop.controller.enable(loop.now) is None
    loop.run(0.5)
    np.testing.assert_allclose(sent_since(loop, count)[0], held + [0.5, -0.5])


def test_after_a_short_outage_motion_goes_on_from_a_trusted_pose() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.states = False
    loop.run(2.0)
    loop.states = True
    count = len(loop.sent)
    loop.run(0.15)
    assert hold_code(loop) == "unsettled_pose"
    assert np.ptp(np.array(sent_since(loop, count)), axis=0).max() == 0.0  # held
    loop.run(0.5)
    assert loop.controller.hold is None
    assert np.abs(np.diff(loop.path, axis=0)).max() < 0.02


@pytest.mark.parametrize("what", ["states", "cameras"])
def test_a_long_outage_ends_in_disabled(what: str) -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    setattr(loop, what, False)
    loop.run(4.9)
    assert hold_code(loop) == "stale"
    loop.run(1.0)
    count = len(loop.sent)
    loop.run(0.5)
    assert not sent_since(loop, count)
    setattr(loop, what, True)
    loop.run(2.0)
    assert not sent_since(loop, count)
    state = loop.controller.state
    assert state.mode == "disabled"
    assert "after more than 5 s (resume_within) of stale" in state.detail
    assert loop.controller.enable(loop.now) is None
    loop.run(0.5)
    assert loop.controller.hold is None


def test_a_reset_before_the_pose_settles_does_not_let_the_arm_go_on() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.states = False
    loop.run(1.0)
    loop.position = loop.position + 1.0  # pushed meanwhile
    loop.states = True
    loop.run(0.1)
    assert hold_code(loop) == "unsettled_pose"
    count = len(loop.sent)
    loop.controller.reset()
    loop.run(2.0)
    assert not sent_since(loop, count)
    assert "~/reset accepted a pose that was not trusted" in loop.controller.state.detail
    assert loop.controller.enable(loop.now) is None
    loop.run(0.5)
    assert loop.controller.hold is None


def test_an_input_that_never_came_is_waited_for() -> None:
    loop = Loop(enable=False)
    loop.observations.forget()
    loop.cameras = False
    loop.settle()
    loop.observations.cameras[0].forget()
    assert loop.controller.enable(loop.now) is None
    loop.run(10.0)
    assert hold_code(loop) == "stale"
    loop.cameras = True
    loop.run(1.0)
    assert loop.controller.hold is None


def test_a_stopped_arm_is_left_alone() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.controller.estop("operator")
    count = len(loop.sent)
    loop.run(0.2)
    assert len(sent_since(loop, count)) == 1  # one hold, so that a twist ends too
    count = len(loop.sent)
    loop.follows = False
    by_hand(loop, 0.6)
    assert not sent_since(loop, count)
    assert loop.controller.state.mode == "stopped"
    assert loop.controller.end(loop.now) is None  # deactivation sends nothing either
    loop.controller.reset()
    pose = loop.position
    assert loop.controller.enable(loop.now) is None
    loop.follows = True
    loop.run(0.1)
    np.testing.assert_allclose(sent_since(loop, count)[0], pose, atol=1e-12)


def test_an_arm_that_is_moved_during_a_hold_is_not_pulled_back() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.cameras = False
    loop.run(0.5)
    assert hold_code(loop) == "stale"
    loop.follows = False
    held = loop.path[-1]
    by_hand(loop, 0.6)
    count = len(loop.sent)
    loop.run(0.3)
    assert not sent_since(loop, count) or np.abs(sent_since(loop, count)[0] - held).min() > 0.29
    loop.cameras = loop.follows = True
    loop.run(1.0)
    path = np.array(sent_since(loop, count))
    assert np.abs(path[0] - (held + 0.6)).max() < 0.05
    assert loop.controller.hold is None


def test_out_of_silence_a_stopped_arm_stays_where_it_was_moved() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.controller.estop("an operator")
    loop.run(0.1)
    loop.now += 10.0
    loop.position = loop.position + 0.5
    loop._joints()
    loop._image()
    assert loop.controller.enable(loop.now, insist=True).code == "estop"  # type: ignore[union-attr]
    assert loop.controller.tick(loop.now, loop.now) is None
    assert loop.controller._clock_fault is None


def test_out_of_a_conflict_motion_waits_for_an_operator() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    held = loop.path[-1]
    loop.controller.note_conflict("another node")
    loop.run(0.1)
    state = loop.controller.state
    assert (state.mode, state.code, state.detail) == ("disabled", "conflict", "another node")
    assert loop.controller.enable(loop.now).code == "conflict"  # type: ignore[union-attr]
    loop.controller.note_conflict(None)
    loop.run(1.0)
    state = loop.controller.state
    assert state.mode == "disabled"
    assert "there was a conflict: another node" in state.detail
    count = len(loop.sent)
    loop.run(0.5)
    assert not sent_since(loop, count)
    assert loop.controller.enable(loop.now) is None
    loop.run(0.1)
    np.testing.assert_allclose(sent_since(loop, count)[0], held, atol=1e-12)


def test_the_reason_after_a_conflict_has_the_name_that_came_later() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    for reason in (f"{UNNAMED} publishes", "/second publishes", f"{UNNAMED} publishes", None):
        loop.controller.note_conflict(reason)
        loop.run(0.1)
    assert loop.controller.state.detail.startswith("there was a conflict: /second publishes; see")


def test_a_name_that_comes_later_does_not_replace_another_reason() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.controller.interrupt("the robot restarted")
    for reason in (f"{UNNAMED} publishes", "/second publishes", None):
        loop.controller.note_conflict(reason)
        loop.run(0.1)
    assert loop.controller.state.detail.startswith("the robot restarted")


def test_a_restarted_driver_needs_an_operator() -> None:
    loop = Loop(step=0.3)
    loop.run(1.0)
    loop.controller.interrupt("the publisher of shoulder restarted")
    loop.run(0.5)
    assert "the publisher of shoulder restarted" in loop.controller.state.detail
    count = len(loop.sent)
    loop.run(1.0)
    assert not sent_since(loop, count)
    assert loop.controller.enable(loop.now) is None
    loop.run(0.5)
    assert loop.controller.hold is None


def test_a_driver_that_begins_with_zeros_moves_nothing() -> None:
    """Joint states pause, and then contain zeros: no command follows them, even after `enable`."""
    loop = Loop(step=0.1)
    loop.run(1.0)
    loop.follows = False
    loop.position = np.array([1.4, -1.4])
    loop.controller.disable()
    loop.settle()
    loop.controller.reset()
    assert loop.controller.enable(loop.now) is None
    loop.follows = True
    loop.run(0.5)
    true = loop.position
    for zeros in (0.02, 0.1, 1.0):
        loop.states = loop.follows = False
        loop.run(1.0)
        count = len(loop.sent)
        loop.states = True
        loop.position = np.zeros(2)
        loop.run(zeros)
        loop.controller.enable(loop.now)
        loop.run(0.02)
        loop.position = true
        loop.run(1.0)
        for sent in sent_since(loop, count):
            assert np.abs(sent - true).max() <= 0.1
        loop.follows = True
        loop.controller.reset()
        assert loop.controller.enable(loop.now) is None
        loop.run(0.5)
        assert loop.controller.hold is None
        true = loop.position
