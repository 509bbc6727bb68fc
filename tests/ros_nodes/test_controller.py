"""The control loop in simulated time: when it requests chunks, and that commands stay continuous
for any delays.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.serialization import serialize_message

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.chunk_stream import Target
from ceed_vla.ros_nodes.robot.diagnostics import ClampWatch, level_of
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.mode import Mode, State
from ceed_vla.ros_nodes.robot.motion import Motion
from ceed_vla.ros_nodes.robot.robot_config import Action
from ceed_vla.ros_nodes.robot.step_grid import SLEW, StepGrid
from tests.ros_nodes.loop import CLIMB, DT, EVEN, PIXELS, RATE, H, Loop, robot, stamp


@pytest.mark.parametrize("camera_rate", [15.0, 30.0, 29.97])
@pytest.mark.parametrize("delay", [0.001, 0.012, 0.045, 0.3])
def test_images_are_used_just_in_time_and_motion_is_even(camera_rate: float, delay: float) -> None:
    loop = Loop(camera_rate)
    loop.policy.delay = delay
    loop.run(10.0)
    seen = len(loop.policy.asked)
    loop.run(10.0)
    numbers = loop.controller.statistics
    assert loop.controller.hold is None
    # steps of equal length, no seam
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3, atol=1e-9)
    assert (
        numbers.slips
        == numbers.missed
        == loop.stream.counters.starved
        == loop.stream.counters.late
        == 0
    )
    asked = loop.policy.asked[seen:]
    # until it takes over
    waits = np.array([r.deadline_s - loop.stream.grace * DT for _, r in asked])
    if delay == 0.001:  # a delay below a tick has no further effect
        delay = 0.01
    if delay < 0.1:
        # 45 ms is half a step: then the running step may be the chunk's first one
        assert {request.frozen_steps for _, request in asked} <= ({0, 1} if delay > 0.04 else {0})
        assert len(asked) == pytest.approx(10.0 / (H * DT), abs=1)
        assert np.median(waits) < delay + 0.006
    else:
        assert {request.frozen_steps for _, request in asked} <= {2, 3}
    gaps = np.diff([now for now, _ in loop.sent])
    assert np.abs(gaps - 1 / RATE).max() <= SLEW / RATE + 1e-9


@pytest.mark.parametrize("delay", [0.02, 0.045, 0.08, 0.1, 0.14, 0.3])
def test_the_pose_that_a_policy_sees_as_commanded_is_that_of_its_images(
    delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    loop.policy.delay = delay
    loop.run(3.0)
    ahead = []  # of the arm at the request [steps]
    snapshot = loop.observations.snapshot

    def look(motion: Motion) -> dict[str, Any]:
        ahead.append((motion.joints[0] - loop.position[0]) / CLIMB)
        return snapshot(motion)

    monkeypatch.setattr(loop.observations, "snapshot", look)
    loop.run(3.0)
    assert len(ahead) > 5
    assert np.abs(ahead).max() <= 0.5 + 1 / (RATE * DT)  # a tick's command counts to the next tick


def test_where_ticks_are_given_they_are_not_moved() -> None:
    loop = Loop(slew=0.0)
    loop.run(5.0)
    np.testing.assert_allclose(np.diff([now for now, _ in loop.sent]), 1 / RATE, atol=1e-9)
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    delays=st.lists(st.floats(0.001, 0.6), min_size=8, max_size=8),
    late=st.dictionaries(st.integers(20, 300), st.floats(0.0, 0.05), max_size=12),
)
def test_commands_come_every_tick_and_never_jump(
    delays: list[float], late: dict[int, float]
) -> None:
    loop = Loop()
    loop.late = late
    for delay in delays:
        loop.policy.delay = delay
        loop.run(0.5)
    assert all(decision is not None and decision.positions is not None for _, decision in loop.sent)
    gaps = np.diff([now for now, _ in loop.sent])
    steps = loop.steps()
    assert (steps >= -1e-9).all()  # the policy only climbs
    # A late tick makes up for the ticks that it replaces, and a late chunk catches up in the rest
    # of its step.
    assert (steps <= 2.0 * EVEN * np.maximum(gaps * RATE, 1.0) + 1e-9).all()


def test_an_answer_just_after_its_boundary_still_decides() -> None:
    loop = Loop()
    loop.policy.delay = 0.02
    loop.run(8.0)
    loop.policy.delay = 0.045  # about two ticks later than expected
    asked = len(loop.policy.asked)
    loop.run(0.5)
    assert loop.policy.asked[asked][1].frozen_steps == 0
    assert loop.stream.counters.late == 0
    assert loop.controller.statistics.to_command.percentile(100) < 0.07
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3)  # the policy ignores the change


def test_images_that_stop_hold_the_arm_and_it_goes_on_from_there() -> None:
    loop = Loop()
    loop.run(2.0)
    loop.cameras = False
    loop.run(1.0)
    assert loop.controller.hold.code == "stale"
    held = loop.path[-1]
    loop.run(1.0)
    np.testing.assert_array_equal(loop.path[-1], held)
    loop.cameras = True
    loop.run(1.0)
    assert loop.controller.hold is None
    assert np.abs(loop.steps()).max() <= EVEN * 1.5
    assert loop.path[-1, 0] > held[0]


def test_a_new_instruction_is_asked_for_at_once() -> None:
    loop = Loop()
    loop.policy.delay = 0.15
    loop.run(3.0)
    loop.controller.stream.instruct("climb faster")
    loop.run(0.35)
    changed = [now for now, request in loop.policy.asked if request.instruction == "climb faster"]
    assert changed
    # as soon as the pending answer is dropped
    assert changed[0] - 103.0 <= 0.16 + 1.5 / RATE
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3)


def test_a_policy_that_died_holds_and_says_so() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.failed = "The inference process ended (exit code -9)."
    loop.run(0.1)
    assert loop.controller.hold.code == "inference_failed"
    assert "exit code -9" in loop.controller.hold.detail
    held = Counter(loop.safety.holds)
    loop.run(0.1)
    assert loop.safety.holds["inference_failed"] > held["inference_failed"]


def test_ticks_fit_steps() -> None:
    assert StepGrid(100.0, 0.1).ticks_per_step == 10
    assert StepGrid(100.0, 1 / 30).ticks_per_step == pytest.approx(10 / 3)
    with pytest.raises(ConfigError, match="at least the 10 steps per second"):
        StepGrid(9.0, 0.1)


# ---- cameras and frame rates that match no step --------------------------------------------------


@pytest.mark.parametrize("camera_rate", [29.6, 29.7, 29.8, 30.3])
def test_cameras_that_drift_against_the_steps_are_followed(camera_rate: float) -> None:
    loop = Loop(camera_rate)
    loop.policy.delay = 0.016
    loop.run(30.0)
    latency = np.array(loop.controller.statistics.to_command)[-50:]
    assert np.median(latency) < 0.016 + 0.006
    assert latency.max() < 0.030  # a proportional lock alone: 52 ms (p50) at 29.7 Hz


@pytest.mark.parametrize("phase", [0.001, 0.006, 0.011, 0.017, 0.023, 0.029])
def test_the_first_chunks_teach_the_lock_no_drift(phase: float) -> None:
    loop = Loop(30.0, phase=phase, replan_steps=3)
    loop.policy.delay = 0.016
    loop.run(10.0)
    # no images were missed
    assert max(list(loop.controller.statistics.to_command)[4:]) < 0.016 + 0.010


@pytest.mark.parametrize("fps", [30.0, 25.0, 15.0, 7.0])
def test_the_command_rate_need_be_no_multiple_of_the_steps(fps: float) -> None:
    loop = Loop(dt=1.0 / fps)
    loop.policy.delay = 0.012
    loop.run(10.0)
    assert loop.controller.hold is None
    np.testing.assert_allclose(loop.steps(100), CLIMB * fps / RATE, rtol=1e-3)
    assert loop.controller.statistics.slips == loop.stream.counters.starved == 0


# ---- actions and limits -----------------------------------------------------------------------


class Increments:
    """A policy of increments, instead of the positions of `Policy`."""

    def __init__(self, loop: Loop, wanted: Callable[[float], float], **limits: Any) -> None:
        loop.safety.limits = replace(loop.safety.limits, **limits)
        loop.controller._motion._robot = replace(robot(), action=Action("joint_delta", DT))
        self.loop, self.target, self.wanted = loop, loop.stream.target, wanted
        loop.stream.target = self  # type: ignore[method-assign, assignment]

    def __call__(self) -> Target:
        found = self.target()
        return (
            replace(found, action=np.array([self.wanted(self.loop.now), 0.0]))
            if found.action is not None
            else found
        )


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_velocity": np.full(2, 0.1)}, 0.011),
        ({"max_velocity": np.full(2, 0.5), "max_acceleration": np.full(2, 0.2)}, 0.5),
        ({"position_high": np.array([0.1, 9.0])}, 1e-9),
    ],
)
def test_increments_do_not_run_away_from_an_arm_with_low_limits(
    limits: dict[str, Any], most: float
) -> None:
    loop = Loop()
    Increments(loop, lambda now: 0.05 if now < 103 else 0.0 if now < 106 else -0.02, **limits)
    loop.run(3.0)
    assert 0 <= loop.controller._motion.joints[0] - loop.path[-1, 0] < most
    there, at = loop.path[-1, 0], len(loop.path)
    loop.run(3.0)
    # without further increments it soon stands still
    assert loop.path[-1, 0] - there < most + 0.01
    assert loop.steps()[-1] == pytest.approx(0, abs=1e-9)
    loop.run(2.0)
    assert loop.path[at:, 0].max() - loop.path[-1, 0] > 0.15  # and it turns back at once


def test_increments_within_the_limits_are_all_executed() -> None:
    loop = Loop()
    Increments(loop, lambda now: 0.02)
    loop.run(6.0)
    assert np.allclose(loop.steps(60), EVEN)
    assert not any(loop.safety.clamps.values())


def test_increments_with_an_acceleration_keep_their_speed() -> None:
    loop = Loop()
    Increments(
        loop, lambda now: 0.1, max_velocity=np.full(2, 2.0), max_acceleration=np.full(2, 2.0)
    )
    loop.run(4.0)
    assert loop.steps()[-50:].mean() * RATE == pytest.approx(1.0, rel=0.02)  # limit: 1 rad/s


def test_deadlines_are_of_real_time() -> None:
    half, whole = Loop(), Loop()
    half.stream.pace = 0.5
    for loop in (half, whole):
        loop.run(3.0)
    deadlines = [[request.deadline_s for _, request in loop.policy.asked] for loop in (half, whole)]
    assert deadlines[0][0] is deadlines[1][0] is None
    np.testing.assert_allclose(deadlines[0][1:], 0.5 * np.array(deadlines[1][1:]))  # type: ignore[operator]


@pytest.mark.parametrize(("delay", "due"), [(0.02, 3), (0.1, 3), (0.22, 4)])
def test_the_next_chunk_is_due_one_step_sooner_than_in_the_policy_s_own_loop(
    delay: float, due: int
) -> None:
    """Unless the policy is slow. Steps of a chunk count from its request, including the frozen
    ones.
    """
    loop = Loop(replan_steps=None)
    loop.policy.delay = delay
    loop.run(3.0)
    switched = loop.stream.counters.switched
    loop.run(6.0)
    assert loop.policy.spec.n_action_steps == 4
    assert loop.stream.replan_steps == due
    assert loop.stream.counters.switched - switched >= 6.0 / (due * DT) - 1


def test_clamping_that_lasts_is_warned_of() -> None:
    loop = Loop()
    watch = ClampWatch()
    for commands, clamped in ((0, 0), (100, 10), (200, 20), (300, 30), (400, 40)):
        loop.safety.clamps["velocity"] = loop.safety.clamped = clamped
        assert watch.look(commands, loop.safety) == ""
    for second in range(1, 4):
        loop.safety.clamps["position"] = 60 * second
        loop.safety.clamped = 40 + 60 * second
        warning = watch.look(400 + 100 * second, loop.safety)
        assert bool(warning) == (second >= 3), second
    assert warning.startswith(
        "180 of the last 300 commands were clamped (position 180, velocity 40 in total)"
    )
    assert watch.look(0, loop.safety) == ""  # the node was configured again


def test_stale_inputs_that_keep_coming_hint_at_the_clocks() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.cameras = False
    loop.run(0.5)
    assert loop.controller.hold is not None
    assert "synchronized" not in loop.controller.hold.detail
    for _ in range(5):
        loop.run(0.05)
        late = array_to_image(PIXELS, stamp(loop.now - 60.0), "camera")
        loop.observations.cameras[0].take(serialize_message(late))
        loop.observations.arrived("front", loop.now)
    assert loop.controller.hold.code == "stale"
    assert (
        "it arrives with such stamps. Are the clocks of both computers"
        in loop.controller.hold.detail
    )


def test_simulated_time_that_stops_is_told() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.controller.watch_ticks(0.3)
    assert loop.controller.state.mode == "moving"
    loop.controller.watch_ticks(3.0)
    state = loop.controller.state
    assert (state.mode, state.code) == ("holding", "clock")
    assert "no tick for 3.0 s: /clock has stopped" in state.detail
    loop.run(0.1)
    assert loop.controller.hold is None


def test_late_ticks_allow_no_more_motion_than_the_time_that_passed() -> None:
    loop = Loop()
    slow = np.full(2, 0.1)  # [rad/s]; the policy wants 0.2
    loop.safety.limits = replace(loop.safety.limits, max_velocity=slow)
    loop.late = dict.fromkeys(range(0, 5000, 2), 0.009)
    loop.run(10.0)
    (begin, first), *_, (end, last) = (
        (now, one.positions[0])
        for now, one in loop.sent
        if one is not None and one.positions is not None and one.positions[0] > 0.0
    )
    assert last - first == pytest.approx(0.1 * (end - begin), rel=0.03)


def test_every_answer_has_its_request() -> None:
    """Also one that was sent when the running chunk had not passed its frozen steps."""
    loop = Loop()
    delays, known = itertools.cycle((0.44, 0.44, 0.32)), []
    submit, poll = loop.policy.submit, loop.policy.poll

    def asked(request: Any) -> bool:
        loop.policy.delay = next(delays)
        return submit(request)

    def answered() -> Any:
        response = poll()
        if response is not None:
            known.append(response.id in loop.stream._requests)
        return response

    loop.policy.submit, loop.policy.poll = asked, answered
    loop.run(10.0)
    assert len(known) > 10
    assert all(known)


def test_the_level_of_a_state() -> None:
    guided = State(Mode.GUIDED, detail="a person commands the arm")
    assert level_of(guided, warn=False) == DiagnosticStatus.OK
    assert level_of(State(Mode.HOLDING, "stale", "front"), warn=False) == DiagnosticStatus.ERROR
