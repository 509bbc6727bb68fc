"""Operators and the control loop in simulated time: they allow motion, stop it, and send the arm
home.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from ceed_vla.ros_nodes.robot.controller import HOME_SPEED
from tests.ros_nodes.loop import CLIMB, EVEN, RATE, Loop


def test_motion_begins_gently() -> None:
    loop = Loop(blend_in=2.0)
    loop.run(1.0)
    gentle = loop.path[-1, 0]
    assert loop.steps().max() < 1.1 * EVEN
    loop.run(3.0)
    whole = Loop()
    whole.run(1.0)
    assert 0.2 * whole.path[-1, 0] < gentle < 0.7 * whole.path[-1, 0]
    np.testing.assert_allclose(loop.steps(350), EVEN, rtol=1e-3)  # and then continues evenly
    whole.run(3.0)
    assert loop.path[-1, 0] == pytest.approx(whole.path[-1, 0], abs=2 * CLIMB)


def test_motion_begins_gently_behind_a_slow_first_chunk_too() -> None:
    loop, usual = Loop(blend_in=2.0), Loop(blend_in=2.0)
    loop.policy.delay = 2.5  # [s]
    loop.run(2.6)
    moving = len(loop.sent)
    loop.policy.delay = usual.policy.delay
    loop.run(0.3)
    usual.run(0.4)
    first = np.abs(np.diff(loop.path[moving - 10 :, 0])).max()
    assert 0 < first < 0.5 * EVEN
    assert first == pytest.approx(np.abs(np.diff(usual.path[:, 0])).max(), rel=0.5)


@pytest.mark.parametrize("why", ["camera", "starved"])
def test_a_hold_while_motion_begins_throws_nothing_back(why: str) -> None:
    loop = Loop(blend_in=4.0)
    loop.run(2.0)
    loop.cameras, loop.policy.delay = why != "camera", 0.02 if why == "camera" else 2.0
    loop.run(0.6 if why == "camera" else 3.0)
    before, loop.cameras, loop.policy.delay = len(loop.path), True, 0.02
    loop.run(5.0)
    assert loop.steps(before - 3).min() > -1e-9
    assert loop.path[-1, 0] > loop.path[before - 3, 0] + 0.3


def test_enabling_or_going_home_in_motion_goes_on_from_the_command() -> None:
    for home in ((), (3.0, 0.5)):
        loop = Loop()
        loop.follows = False  # except for the commands of 10 ticks ago
        for tick in range(200):
            loop.run(0.011)
            loop.position = loop.path[max(len(loop.path) - 10, 0)]
            if tick == 150:
                assert loop.path[-1, 0] > loop.position[0] + 0.01
                assert loop.controller.enable(loop.now) is None
                assert loop.controller.enable(loop.now, home=home) is None  # twice
        assert loop.steps().min() > -1e-9
        assert len(loop.sent) > 190
        assert loop.path[-1, 0] > loop.path[150, 0] + 0.05


@pytest.mark.parametrize("acceleration", [0.5, 2.0, 100.0])
def test_the_way_home_takes_as_long_as_its_speed_says(acceleration: float) -> None:
    loop = Loop()
    loop.run(0.5)
    loop.safety.limits = replace(loop.safety.limits, max_acceleration=np.full(2, acceleration))
    loop.controller.disable()
    loop.run(0.1)
    assert loop.controller.enable(loop.now, home=(1.0, 0.5)) is None
    before, way = len(loop.path), 1.0 - loop.position[0]
    loop.run(10.0)
    steps = RATE * np.diff(loop.path[before:], axis=0)
    assert np.allclose(loop.path[-1], (1.0, 0.5))
    assert np.abs(steps).max() < HOME_SPEED + 1e-6
    assert RATE * np.abs(np.diff(steps, axis=0)).max() < acceleration + 1e-6
    assert len(loop.path) - before < RATE * (way / HOME_SPEED + HOME_SPEED / acceleration + 0.3)


def test_a_home_outside_the_limits_is_refused() -> None:
    loop = Loop()
    refused = loop.controller.enable(loop.now, home=(99.0, 0.0))
    assert refused is not None
    assert (refused.code, loop.safety.enabled) == ("no_home", False)


def test_going_home_is_slow_needs_no_images_and_ends_disabled() -> None:
    loop = Loop()
    loop.run(3.0)
    loop.cameras, start = False, loop.path[-1]
    assert loop.controller.enable(loop.now, home=(0.1, 0.0)) is None
    count = len(loop.sent)
    loop.run(0.5)
    assert loop.controller.state.mode == "moving"
    loop.run(8.0)
    path = np.array([d.positions for _, d in loop.sent[count:] if d is not None])
    assert np.abs(np.diff(path, axis=0)).max() <= HOME_SPEED / RATE * 1.05
    assert path[0] == pytest.approx(start, abs=0.01)
    assert path[-1] == pytest.approx([0.1, 0.0], abs=1e-9)
    assert str(loop.controller.state) == "disabled: not enabled"
    loop.controller.estop("operator")
    assert loop.controller.enable(loop.now, home=(0.1, 0.0)).code == "estop"


@pytest.mark.parametrize("delay", [0.016, 0.13, 0.4])
def test_the_first_action_takes_one_chunk(delay: float) -> None:
    """No chunk is requested from images before `enable`: its answer would be dropped, and the next
    request would have to wait for it.
    """
    loop = Loop(enable=False)
    loop.policy.delay = delay
    loop.run(0.5)
    enabled, count = loop.now, len(loop.sent)
    assert loop.controller.enable(enabled) is None
    loop.run(1.0)
    moved = next(
        now for now, decision in loop.sent[count:] if decision is not None and decision.hold is None
    )
    # the next image, its tick, the answer's tick
    assert enabled + delay < moved < enabled + delay + 1 / 30 + 0.03
    assert [now < moved for now, _ in loop.policy.asked].count(True) == 1
    assert loop.policy.asked[0][0] > enabled


def test_a_refused_enable_leaves_motion_disabled() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.states = False
    loop.run(0.5)
    assert loop.controller.enable(loop.now).code == "stale"
    assert loop.controller.state.mode == "disabled"
    loop.states, count = True, len(loop.sent)
    loop.run(0.5)
    # the end of the earlier motion
    assert len([d for _, d in loop.sent[count:] if d is not None]) <= 1


def test_states_are_true_at_once() -> None:
    loop = Loop()
    assert loop.controller.state.mode == "waiting"
    loop.run(1.0)
    assert loop.controller.state.mode == "moving"
    loop.controller.reset()  # no stop is latched, so the arm continues, and the answer says so
    assert str(loop.controller.state) == "moving"
    loop.controller.estop("~/estop")
    assert str(loop.controller.state) == "stopped: estop: emergency stop (~/estop)"
    loop.controller.reset()
    assert loop.controller.state.mode == "disabled"
    assert loop.controller.enable(loop.now) is None
    assert loop.controller.state.mode == "waiting"
    loop.policy.failed = "The inference process ended (exit code -9)."
    refused = loop.controller.enable(loop.now)
    assert refused.code == "inference_failed"
    assert "exit code -9" in refused.detail
    loop.run(0.1)
    assert loop.controller.state.mode == "disabled"


def test_until_the_policy_is_loaded_the_arm_waits() -> None:
    loop = Loop(enable=False)
    loop.controller.stream._loaded, loop.policy.ready = False, False
    assert loop.controller.enable(loop.now) is None
    loop.run(1.0)
    assert str(loop.controller.state) == "waiting: for the policy, which is being loaded"
    assert not loop.policy.asked
    loop.policy.ready = True
    loop.run(0.5)
    assert loop.controller.state.mode == "moving"
