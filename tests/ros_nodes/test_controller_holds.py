"""The control loop while the arm's pose is unknown, an input repeats itself, or the policy refuses
the instruction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState

from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.observations import Observations
from ceed_vla.ros_nodes.robot.robot_config import ImageSource
from tests.ros_nodes.loop import JOINTS, Loop, robot, stamp


def hold_code(loop: Loop) -> str:
    return loop.controller.hold.code


def sent_since(loop: Loop, count: int) -> list[np.ndarray]:
    return [d.positions for _, d in loop.sent[count:] if d is not None and d.positions is not None]


def test_implausible_joint_states_hold_until_an_operator_enables() -> None:
    loop = Loop()
    loop.run(1.0)
    held, true = loop.path[-1], loop.position
    loop.follows, loop.position = False, true + [1.0, 0.0]
    loop.run(0.5)
    assert hold_code(loop) == "implausible_joint_states"
    np.testing.assert_allclose(loop.path[-1], held, atol=1e-12)
    loop.position = true
    loop.run(2.0)
    assert hold_code(loop) == "implausible_joint_states"
    np.testing.assert_allclose(loop.path[-1], held, atol=1e-12)
    assert loop.safety.holds["implausible_joint_states"] > 200
    assert loop.controller.enable(loop.now) is None
    loop.follows = True
    loop.run(0.5)
    assert loop.controller.hold is None
    assert np.abs(np.diff(loop.path, axis=0)).max() < 0.02


STRANGE = (float("nan"), float("inf"), 1e308, -1e308, 1e9, 57.3, 1.0, 0.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_strange_messages_hold_and_raise_nothing(data: st.DataObject) -> None:
    loop = Loop()
    loop.run(0.3)
    for _ in range(data.draw(st.integers(1, 6))):
        names = data.draw(st.lists(st.sampled_from([*JOINTS, "", "x" * 10_000]), max_size=5))
        count = data.draw(st.sampled_from([len(names), 0, 7]))
        values = data.draw(st.lists(st.sampled_from(STRANGE), min_size=count, max_size=count))
        state = JointState(name=names, position=values, velocity=values[:1])
        state.header.stamp = stamp(
            data.draw(st.sampled_from([0.0, loop.now, loop.now - 0.001, 2e9]))
        )
        size = st.sampled_from([0, 1, 4, 12, 2**32 - 1])
        image = array_to_image(np.zeros((4, 4, 3), np.uint8), stamp(loop.now), "camera")
        image.width, image.height, image.step = data.draw(size), data.draw(size), data.draw(size)
        image.encoding = data.draw(st.sampled_from(["rgb8", "", "mono16", "x" * 10_000]))
        loop.safety.measure(state.name, state.position, loop.now)
        loop.observations.take_joints(state)
        loop.observations.cameras[0].take(serialize_message(image))
        decision = loop.controller.tick(loop.now, loop.now)
        loop.controller.after_tick(loop.now)
        loop.controller.observed(loop.now)
        assert decision is None or (
            decision.positions is not None and np.abs(decision.positions).max() < 0.2
        )
        loop.now += 0.01


# ---- instructions that the policy refuses --------------------------------------------------------


def test_a_refused_instruction_is_not_asked_before_the_tick_that_holds() -> None:
    loop = Loop()
    loop.run(1.03)
    asked = len(loop.policy.asked)
    while not loop.policy.idle:
        loop.run(0.011)
    loop.controller.stream.instruct("x" * 10_000)
    for _ in range(3):
        loop._image()
        loop.controller.observed(loop.now)
    assert len(loop.policy.asked) - asked <= 1  # the pending request
    assert loop.policy.idle
    loop.run(0.1)
    assert loop.controller.hold is not None
    assert loop.controller.hold.code == "bad_instruction"
    assert "10000 characters" in loop.controller.hold.detail


def test_a_refused_instruction_holds_at_once_and_is_asked_once() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.error = ("The instruction has 600 words.", "bad_instruction")
    loop.controller.stream.instruct("word " * 80)
    asked = len(loop.policy.asked)
    loop.run(3.0)
    assert hold_code(loop) == "bad_instruction"
    assert "600 words" in loop.controller.hold.detail
    assert len(loop.policy.asked) <= asked + 2  # the pending request had the old instruction
    loop.policy.error = None
    loop.controller.stream.instruct("climb on")
    loop.run(0.2)
    assert loop.controller.hold is None


@pytest.mark.parametrize("text", ["x" * 501, "up\n and down", "up\x1b[2J", "\ud800"])
def test_texts_that_are_no_instructions_never_reach_the_policy(text: str) -> None:
    loop = Loop()
    loop.run(1.0)
    loop.controller.stream.instruct(text)
    asked = len(loop.policy.asked)
    loop.run(1.0)
    assert hold_code(loop) == "bad_instruction"
    assert len(loop.policy.asked) == asked
    loop.controller.stream.instruct("x" * 500)
    loop.run(0.3)
    assert loop.controller.hold is None


@pytest.mark.parametrize(("code", "hold"), [("not_finite", "not_finite"), ("", "policy_error")])
def test_a_policy_that_fails_is_asked_less_and_less_often(code: str, hold: str) -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.error = ("The scores are not finite.", code)
    asked = len(loop.policy.asked)
    loop.controller.outage.within = 60.0
    loop.run(10.0)
    assert hold_code(loop) == hold
    assert "The scores are not finite." in loop.controller.hold.detail
    assert 5 <= len(loop.policy.asked) - asked <= 12  # after 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, ... s
    loop.policy.error = None
    loop.run(2.5)
    assert loop.controller.hold is None
    starved = loop.stream.counters.starved
    loop.run(5.0)
    assert loop.stream.counters.starved == starved


@pytest.mark.parametrize("begun", [True, False], ids=["in motion", "before the first chunk"])
def test_a_chunk_of_old_images_moves_nothing(begun: bool) -> None:
    loop = Loop()
    if begun:
        loop.run(1.0)
    loop.policy.delay = 25.0
    loop.run(3.0)
    assert hold_code(loop) == ("starved" if begun else "waiting")
    loop.run(15.0)  # a policy that stands still in motion needs an operator; a first chunk does not
    assert loop.controller.state.mode == ("disabled" if begun else "waiting")
    loop.policy.delay = 0.02
    before = loop.position.copy()
    loop.run(30.0)
    if begun:
        np.testing.assert_array_equal(loop.position, before)
        assert "after more than 5 s (resume_within) of starved" in loop.controller.state.detail
        assert loop.controller.enable(loop.now) is None
        loop.run(0.5)
    assert loop.controller.hold is None
    assert max(loop.controller.statistics.to_command) < 0.3  # none from the old images


def test_a_policy_that_hangs_needs_an_operator() -> None:
    loop = Loop()
    loop.policy.delay = 60.0
    loop.run(29.0)
    assert loop.controller.state.mode == "waiting"
    loop.run(50.0)  # the answer comes, too
    assert loop.controller.state.mode == "disabled"
    assert "the policy has not answered for 30 s" in loop.controller.state.detail
    assert not np.any(loop.position)


def test_a_policy_that_is_always_too_slow_is_told() -> None:
    loop = Loop()
    loop.policy.delay = 6.0
    loop.run(7.0)
    assert hold_code(loop) == "late_chunk"
    assert "the chunk took 6.0 s, longer than 5 s (resume_within)" in loop.controller.hold.detail
    loop.run(10.0)
    assert loop.controller.state.mode == "disabled"
    assert not np.any(loop.position)


def test_motion_that_must_never_resume_by_itself_still_begins() -> None:
    loop = Loop(resume_within=0.0)
    loop.run(2.0)
    assert loop.controller.state.mode == "moving"
    assert np.any(loop.position)
    loop.cameras = False
    loop.run(0.5)
    loop.cameras = True
    loop.run(2.0)
    assert loop.controller.state.mode == "disabled"
    assert "after more than 0 s (resume_within) of stale" in loop.controller.state.detail


# ---- inputs that repeat themselves ---------------------------------------------------------------


def test_a_camera_that_repeats_its_image_holds_until_it_does_not() -> None:
    loop = Loop()
    loop.run(2.0)
    loop.alive = False
    loop.run(0.45)
    assert loop.controller.hold is None  # a short time is no proof
    loop.run(0.5)
    assert hold_code(loop) == "frozen_image"
    assert "front repeats the same image" in loop.controller.hold.detail
    held = loop.path[-1]
    loop.run(2.0)
    np.testing.assert_array_equal(loop.path[-1], held)
    for _ in range(5):  # late joint states are no proof against the camera
        loop.states = False
        loop.run(0.15)
        loop.states = True
        loop.run(0.05)
    np.testing.assert_array_equal(loop.path[-1], held)
    loop.alive = True
    loop.run(0.5)
    assert loop.controller.hold is None


def test_images_of_a_scene_at_rest_may_be_the_same() -> None:
    loop = Loop(enable=False)
    loop.alive = False
    loop.run(5.0)
    assert loop.controller.enable(loop.now) is None
    loop.run(0.2)
    loop.alive = True
    loop.run(1.0)
    assert loop.controller.hold is None
    loop.observations._frozen_after, loop.alive = 0.0, False
    loop.run(2.0)
    assert loop.controller.hold is None  # the check is disabled


def test_joint_states_that_do_not_follow_hold_until_an_operator_enables() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.follows = False
    loop.run(1.5)
    assert hold_code(loop) == "frozen_joint_states"
    assert "the same for" in loop.controller.hold.detail
    moved = loop.path[-1, 0] - loop.position[0]
    assert 0.05 < moved < 0.2
    loop.follows = True
    loop.run(1.0)
    assert hold_code(loop) == "frozen_joint_states"
    assert loop.controller.enable(loop.now) is None
    loop.run(1.0)
    assert loop.controller.hold is None

    loop.cameras = False
    loop.run(3.0)  # a rest
    loop.cameras, loop.follows = True, False
    loop.run(0.4)  # and an arm that begins to move slowly
    loop.follows = True
    loop.run(1.0)
    assert loop.controller.hold is None

    dry = Loop()
    dry.safety.follows = dry.follows = False
    dry.run(3.0)
    assert dry.controller.hold is None


def test_a_pose_that_was_wrong_holds_no_longer_than_until_enable() -> None:
    loop = Loop()
    loop.run(1.0)
    true, loop.follows = loop.position.copy(), False
    # a wrong sensor, while the last images of the motion arrive
    loop.position = true + [
        1.0,
        0.0,
    ]
    loop.run(0.3)
    loop.alive = False  # the arm rests, and a simulation's images do not change
    loop.run(1.0)
    loop.position = true
    loop.run(1.0)
    assert hold_code(loop) == "implausible_joint_states"
    loop.follows = True
    assert loop.controller.enable(loop.now) is None
    loop.run(0.3)
    assert loop.controller.hold is None


@pytest.mark.parametrize("apart", [0.0, 0.004, 0.010])
@pytest.mark.parametrize("first", ["front", "wrist"])
def test_two_cameras_are_paired_by_when_their_images_were_taken(apart: float, first: str) -> None:
    """Flags of both cameras may remain from before the start, and either image may arrive first;
    no pair is a period apart.
    """
    sources = tuple(
        ImageSource(f"observation.images.{name}", name, "raw", False) for name in ("front", "wrist")
    )
    shapes = {source.feature: (3, 4, 4) for source in sources}
    observations = Observations(
        replace(robot(), images=sources), shapes, {"observation.state": 2}, None
    )
    cameras = dict(zip(("front", "wrist"), observations.cameras, strict=True))
    pixels, spreads = np.zeros((4, 4, 3), np.uint8), []
    for step in range(-2, 20):
        for name, camera in cameras.items():
            if (step, name, first) == (0, "front", "wrist"):
                continue
            taken = stamp(100.0 + step / 30 + apart * (name == "wrist"))
            camera.take(serialize_message(array_to_image(pixels, taken, "")))
            if step >= 0 and observations.renewed():  # not called while the policy loads
                spreads.append(abs(cameras["front"].stamp - cameras["wrist"].stamp))
    assert len(spreads) >= 18
    assert max(spreads) == pytest.approx(apart, abs=1e-6)


@pytest.mark.parametrize("instruction", ["", "a\0b", "climb"])
def test_enable_answers_what_the_next_tick_does(instruction: str) -> None:
    loop = Loop(enable=False)
    loop.stream.instruct(instruction)
    assert loop.controller.enable(loop.now) is None
    answered = loop.controller.state
    assert answered.code == {"": "no_instruction", "climb": "waiting"}.get(
        instruction, "bad_instruction"
    )
    loop.run(0.005)
    assert (loop.controller.state, loop.controller.hold.code) == (answered, answered.code)
