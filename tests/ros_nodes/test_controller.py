"""The control loop in simulated time: what is asked for when, and that commands stay continuous whatever the delays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image, JointState

from ceed_vla.errors import ConfigError
from ros_nodes.chunk_stream import ChunkStream
from ros_nodes.controller import PolicyController, ticks_per_step
from ros_nodes.messages import array_to_image
from ros_nodes.motion import JointPositions
from ros_nodes.observations import Observations
from ros_nodes.predictor import PolicySpec, Request, Response
from ros_nodes.robot_config import Action, Arm, ImageSource, Interface, Limits, RobotConfig
from ros_nodes.safety import JOINT_STATES, Decision, SafetyFilter, SafetyLimits
from ros_nodes.step_grid import SLEW

FEATURE = "observation.images.front"
JOINTS = ("shoulder", "elbow")
M, H, DT, RATE = 8, 4, 0.1, 100.0
CLIMB = 0.02  # what the policy wants each step [rad]
PIXELS = np.zeros((4, 4, 3), np.uint8)


def robot() -> RobotConfig:
    """Two joints, one camera."""
    return RobotConfig(
        source=Path("robot.yaml"),
        images=(ImageSource(FEATURE, "front/image_raw", "raw", False),),
        joint_states="joint_states",
        states={"observation.state": ("joint_positions",)},
        arm=Arm(None, "", JOINTS, (), "rad"),
        gripper=None,
        action=Action("joint_position", DT),
        limits=Limits((-9.0, -9.0), (9.0, 9.0), (5.0, 5.0), (9.0, 9.0)),
        interfaces={"forward_position": Interface("forward_position", "commands")},
    )


def stamp(now: float) -> Time:
    return Time(sec=int(now), nanosec=int(1e9 * (now % 1)))


class Policy:
    """Stands for the worker: every action is `CLIMB` above the one before, and answers take a given time.

    Attributes:
        delay: Of the next answers [s].
        asked: Every request, with its time.
    """

    def __init__(self) -> None:
        self.spec = PolicySpec(
            "fake", "ceed_vla", {FEATURE: (3, 4, 4)}, {"observation.state": 2}, 2, M, H, True, 0.01
        )
        self.delay, self.now = 0.02, 0.0
        self.error: tuple[str, str] | None = None  # of the next answers: text, code
        self.failed: str | None = None
        self.asked: list[tuple[float, Request]] = []
        self._due: float | None = None
        self._chunks: dict[int, np.ndarray] = {}

    @property
    def idle(self) -> bool:
        return self._due is None

    @property
    def due(self) -> float:
        return np.inf if self._due is None else self._due

    def submit(self, request: Request) -> bool:
        assert self.idle
        self.asked.append((self.now, request))
        self._due = self.now + self.delay
        return True

    def poll(self) -> Response | None:
        if self._due is None or self.now < self._due - 1e-9:
            return None
        self._due = None
        request = self.asked[-1][1]
        if self.error is not None:
            return Response(request.id, error=self.error[0], code=self.error[1])
        at = request.observation["observation.state"][0]
        chunk = at + CLIMB * np.arange(1, M + 1)
        if request.previous is not None:
            before = self._chunks[int(request.previous[0])]
            k = request.frozen_steps
            frozen = before[request.shift_steps : request.shift_steps + k]
            base = frozen[-1] if k else before[request.shift_steps - 1]
            chunk = np.concatenate([frozen, base + CLIMB * np.arange(1, M + 1 - k)])
        self._chunks[request.id] = chunk
        actions = np.stack([chunk, np.zeros(M)], axis=1).astype(np.float32)
        seconds = {"total": self.delay}
        return Response(request.id, actions, np.array([request.id]), 1, "converged", seconds)


class Loop:
    """A robot, its cameras and the controller on one simulated clock.

    Attributes:
        sent: (time, decision) of every tick.
        cameras: Whether images come.
        states: Whether joint states come.
        late: Tick -> how late it is [s].
    """

    def __init__(
        self, camera_rate: float = 30.0, phase: float = 0.017, enable: bool = True, **options: Any
    ) -> None:
        self.policy, self.now = Policy(), 100.0
        config = robot()
        self.observations = Observations(config, self.policy.spec.cameras, self.policy.spec.states, None)
        limits = config.limits
        self.safety = SafetyFilter(
            SafetyLimits(
                JOINTS,
                np.array(limits.low),
                np.array(limits.high),
                np.array(limits.velocity),
                np.array(limits.step),
                {JOINT_STATES: 0.2, "front": 0.3},
            )
        )
        self.stream = ChunkStream(M, H, DT, delay_steps=0.2, least_lead=1.01 / (RATE * DT))
        self.controller = PolicyController(
            self.observations,
            JointPositions(config),
            self.safety,
            self.stream,
            self.policy,  # type: ignore[arg-type]
            command_rate=RATE,
            instruction="climb",
            **options,
        )
        self.sent: list[tuple[float, Decision | None]] = []
        self.position = np.zeros(2)
        self.follows = True  # commands move the arm
        self.cameras = self.states = True
        self.late: dict[int, float] = {}
        self._grid = self.now
        self._image_period = 1.0 / camera_rate
        self._next_image, self._next_tick = self.now + phase, self.now
        self._joints()
        self._image()
        if enable:
            assert self.controller.enable(self.now) is None

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (event := min(self._next_tick, self._next_image, self.policy.due)) < end:
            self.now = self.policy.now = max(event, self.now)
            if event == self.policy.due:
                self.controller.receive(self.now)
                assert self.policy.idle
            elif event == self._next_image:
                self._next_image += self._image_period
                self._image()
                self.controller.observed(self.now)
            else:
                self._tick()

    def _tick(self) -> None:
        self._joints()
        decision = self.controller.tick(self.now, self.now)
        self.sent.append((self.now, decision))
        if decision is not None and decision.positions is not None and self.follows:
            self.position = decision.positions
        self.controller.after_tick(self.now)
        # Like rclpy's timer: the grid does not move when a tick is late, and ticks that are past are left out.
        self._grid += self.controller.grid.period
        while self._grid <= self.now:
            self._grid += self.controller.grid.period
        self._next_tick = self._grid + self.late.get(len(self.sent), 0.0)

    def _joints(self) -> None:
        message = JointState(name=list(JOINTS), position=self.position.tolist())
        message.header.stamp = stamp(self.now)
        if self.states:
            self.safety.measure(message.name, message.position, self.now)
            self.observations.take_joints(message)

    def _image(self) -> None:
        if self.cameras:
            image: Image = array_to_image(PIXELS, stamp(self.now), "camera")
            self.observations.take_image(self.observations.cameras[0], image)

    @property
    def path(self) -> np.ndarray:
        """Commands (T, 2)."""
        return np.array([d.positions for _, d in self.sent if d is not None and d.positions is not None])

    def steps(self, since: int = 0) -> np.ndarray:
        """Change of the first joint from command to command."""
        return np.diff(self.path[since:, 0])


EVEN = CLIMB * 1.0 / (RATE * DT)  # change per tick while nothing disturbs


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
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3, atol=1e-9)  # steps of equal length, no seam
    assert numbers.slips == numbers.missed == loop.stream.counters.starved == loop.stream.counters.late == 0
    asked = loop.policy.asked[seen:]
    waits = np.array([r.deadline_s - loop.stream.grace * DT for _, r in asked])  # until it takes over
    if delay == 0.001:  # faster than a tick does not help
        delay = 0.01
    if delay < 0.1:
        assert {request.frozen_steps for _, request in asked} == {0}
        assert len(asked) == pytest.approx(10.0 / (H * DT), abs=1)
        assert np.median(waits) < delay + 0.006
    else:
        assert {request.frozen_steps for _, request in asked} <= {2, 3}
    gaps = np.diff([now for now, _ in loop.sent])
    assert np.abs(gaps - 1 / RATE).max() <= SLEW / RATE + 1e-9


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
def test_commands_come_every_tick_and_never_jump(delays: list[float], late: dict[int, float]) -> None:
    loop = Loop()
    loop.late = late
    for delay in delays:
        loop.policy.delay = delay
        loop.run(0.5)
    assert all(decision is not None and decision.positions is not None for _, decision in loop.sent)
    gaps = np.diff([now for now, _ in loop.sent])
    steps = loop.steps()
    assert (steps >= -1e-9).all()  # the policy only climbs
    # A late tick makes up for the ones it replaces, and a chunk that came late for its step catches up in the rest.
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
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3)  # this policy's mind is made up


def test_images_that_stop_hold_the_arm_and_it_goes_on_from_there() -> None:
    loop = Loop()
    loop.run(2.0)
    loop.cameras = False
    loop.run(1.0)
    assert loop.controller.hold is not None
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
    loop.controller.instruct("climb faster")
    loop.run(0.35)
    changed = [now for now, request in loop.policy.asked if request.instruction == "climb faster"]
    assert changed
    assert changed[0] - 103.0 <= 0.16 + 1.5 / RATE  # as soon as the answer that was under way is thrown away
    np.testing.assert_allclose(loop.steps(100), EVEN, rtol=1e-3)


def test_a_policy_that_died_holds_and_says_so() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.failed = "The inference process ended (exit code -9)."
    loop.run(0.1)
    assert loop.controller.hold is not None
    assert loop.controller.hold.code == "inference_failed"
    assert "exit code -9" in loop.controller.hold.detail
    held = Counter(loop.safety.holds)
    loop.run(0.1)
    assert loop.safety.holds["inference_failed"] > held["inference_failed"]


# ---- nobody knows where the arm is --------------------------------------------------------------------------------


def hold_code(loop: Loop) -> str:
    assert loop.controller.hold is not None
    return loop.controller.hold.code


def sent_since(loop: Loop, count: int) -> list[np.ndarray]:
    return [d.positions for _, d in loop.sent[count:] if d is not None and d.positions is not None]


def test_enable_waits_for_fresh_joint_states_and_starts_from_them() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.controller.disable()
    loop.run(0.1)
    loop.states = False
    loop.run(0.5)
    loop.position = np.array([0.7, -0.4])  # by hand, and nobody saw it
    refused = loop.controller.enable(loop.now)
    assert refused is not None
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


@pytest.mark.parametrize("pause", [0.5, 4.0, 8.0])
def test_after_a_hold_without_joint_states_the_old_pose_is_never_sent_again(pause: float) -> None:
    loop = Loop()
    loop.run(1.0)
    loop.states, loop.follows = False, False
    loop.run(pause)
    assert hold_code(loop) == "stale"
    held = loop.path[-1]
    if pause > 7.0:
        count = len(loop.sent)
        loop.run(0.1)
        assert not sent_since(loop, count)  # an arm that is powered up again does not leap back
    loop.position = held + [0.5, -0.5]  # by hand
    loop.states, count = True, len(loop.sent)
    loop.run(0.02)
    np.testing.assert_allclose(sent_since(loop, count)[0], loop.position)
    loop.follows = True
    loop.run(1.0)
    assert loop.controller.hold is None
    assert np.abs(np.array(sent_since(loop, count)) - held).max(axis=1).min() > 0.4


def test_out_of_a_conflict_and_out_of_a_stop_motion_waits_for_joint_states() -> None:
    loop = Loop()
    loop.run(1.0)
    for silence in ("conflict", "estop"):
        held = loop.path[-1]
        if silence == "conflict":
            loop.controller.conflict = "another node"
        else:
            loop.controller.estop("operator")
        loop.run(0.1)
        loop.states, loop.follows = False, False
        loop.run(1.0)
        loop.controller.conflict, loop.position = None, held + [0.3, 0.3]
        loop.controller.reset()
        loop.run(0.02)
        count = len(loop.sent)
        if silence == "estop":
            assert hold_code(loop) == "disabled"
            assert loop.controller.enable(loop.now) is not None
        loop.run(0.3)
        assert not sent_since(loop, count)
        loop.states = loop.follows = True
        loop.run(0.02)
        if silence == "estop":
            assert loop.controller.enable(loop.now) is None
        loop.run(0.1)
        np.testing.assert_array_equal(sent_since(loop, count)[0], held + [0.3, 0.3])
        loop.run(1.0)


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
        state.header.stamp = stamp(data.draw(st.sampled_from([0.0, loop.now, loop.now - 0.001, 2e9])))
        size = st.sampled_from([0, 1, 4, 12, 2**32 - 1])
        image = array_to_image(PIXELS, stamp(loop.now), "camera")
        image.width, image.height, image.step = data.draw(size), data.draw(size), data.draw(size)
        image.encoding = data.draw(st.sampled_from(["rgb8", "", "mono16", "x" * 10_000]))
        loop.safety.measure(state.name, state.position, loop.now)
        loop.observations.take_joints(state)
        loop.observations.take_image(loop.observations.cameras[0], image)
        decision = loop.controller.tick(loop.now, loop.now)
        loop.controller.after_tick(loop.now)
        loop.controller.observed(loop.now)
        assert decision is None or (decision.positions is not None and np.abs(decision.positions).max() < 0.2)
        loop.now += 0.01


# ---- what the policy does not take ----------------------------------------------------------------------------------


def test_a_refused_instruction_holds_at_once_and_is_asked_once() -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.error = ("The instruction has 600 words.", "bad_instruction")
    loop.controller.instruct("word " * 80)
    asked = len(loop.policy.asked)
    loop.run(3.0)
    assert hold_code(loop) == "bad_instruction"
    assert "600 words" in loop.controller.hold.detail  # type: ignore[union-attr]
    assert len(loop.policy.asked) <= asked + 2  # the one under way was of the old instruction
    loop.policy.error = None
    loop.controller.instruct("climb on")
    loop.run(0.2)
    assert loop.controller.hold is None


@pytest.mark.parametrize("text", ["x" * 501, "up\n and down", "up\x1b[2J", "\ud800"])
def test_texts_that_are_no_instructions_never_reach_the_policy(text: str) -> None:
    loop = Loop()
    loop.run(1.0)
    loop.controller.instruct(text)
    asked = len(loop.policy.asked)
    loop.run(1.0)
    assert hold_code(loop) == "bad_instruction"
    assert len(loop.policy.asked) == asked
    loop.controller.instruct("x" * 500)
    loop.run(0.3)
    assert loop.controller.hold is None


@pytest.mark.parametrize(("code", "hold"), [("not_finite", "not_finite"), ("", "starved")])
def test_a_policy_that_fails_is_asked_less_and_less_often(code: str, hold: str) -> None:
    loop = Loop()
    loop.run(1.0)
    loop.policy.error = ("The scores are not finite.", code)
    asked = len(loop.policy.asked)
    loop.run(10.0)
    assert hold_code(loop) == hold
    assert "The scores are not finite." in loop.controller.hold.detail  # type: ignore[union-attr]
    assert 5 <= len(loop.policy.asked) - asked <= 12  # after 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, ... s
    loop.policy.error = None
    loop.run(2.5)
    assert loop.controller.hold is None
    starved = loop.stream.counters.starved
    loop.run(5.0)
    assert loop.stream.counters.starved == starved


def test_ticks_fit_steps() -> None:
    assert ticks_per_step(100.0, 0.1) == 10
    with pytest.raises(ConfigError, match="such as 100"):
        ticks_per_step(95.0, 0.1)
