"""No command leads further than `limits.step` from the true pose, for any sequence of joint states,
publishers and operator calls.

Everything between the messages is the node's own: joint sources, observations, safety filter,
controller and action interfaces, on one simulated clock. Only the arm, its drivers and the policy
are simulated here.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from builtin_interfaces.msg import Time
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState

from ceed_vla.ros_nodes.robot import policy_setup
from ceed_vla.ros_nodes.robot.messages import array_to_image
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from ceed_vla.ros_nodes.robot.safety import Decision
from ceed_vla.ros_nodes.robot.streaming import command_message
from ceed_vla.ros_nodes.simulated.controllers import ServoTwist
from ceed_vla.serving.predictor import Request, Response, declared_spec

PERIOD = 0.02  # of commands and of each driver's joint states [s]
EXAMPLES = int(os.environ.get("CEED_VLA_FIRST_COMMAND_EXAMPLES", "20"))  # per interface
FASTEST = 2.0  # speed of a joint under a twist [rad/s]
SEQUENCE = 16  # largest number of events
ROBOT = load_robot_config()
STEP = np.array(ROBOT.limits.step)
FINGERS = ("finger_left", "finger_right")
ARM = ROBOT.arm.joints


@cache
def arm_model() -> Any:
    """The arm's model, compiled once: its only state is the last requested pose."""
    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

    arm = ROBOT.arm
    assert arm.model is not None
    return ModelArm(arm.model, arm.tcp, arm.joints, home=arm.home, max_joint_step=0.6)


class Policy:
    """Replaces the worker: moves the tool at a steady pace, and answers after 30 ms."""

    failed: str | None = None
    ready = True

    def __init__(self) -> None:
        self.spec = declared_spec("student")
        self.now = 0.0
        self._asked: tuple[float, Request] | None = None

    def begin(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def idle(self) -> bool:
        return self._asked is None

    def submit(self, request: Request) -> bool:
        self._asked = (self.now, request)
        return True

    def poll(self) -> Response | None:
        if self._asked is None or self.now < self._asked[0] + 0.03:
            return None
        request = self._asked[1]
        self._asked = None
        actions = np.tile(
            np.float32([0.5, -0.5, 0.3, 0.1, 0.0, 0.2, 1.0]), (self.spec.chunk_steps, 1)
        )
        return Response(request.id, actions, None, seconds={"total": 0.03})


class Driver:
    """Publishes joint states, each with a number as from the middleware."""

    def __init__(self, world: World, names: tuple[str, ...], offset: float) -> None:
        self.world, self.names = world, names
        self.number = 0
        self.due = world.now + offset
        # published instead of the arm's pose (7,) [rad]
        self.wrong: np.ndarray | None = None

    def publish(self) -> None:
        self.due += PERIOD
        self.number += 1
        pose = self.world.true if self.wrong is None else self.wrong
        if self.wrong is None:
            self.world.told = pose
        positions = dict(zip((*ARM, *FINGERS), [*pose, 0.04, 0.04], strict=True))
        message = JointState(
            name=list(self.names), position=[positions[name] for name in self.names]
        )
        message.header.stamp = stamp(self.world.now)
        self.world.hear(message, self.number)


class World:
    """The arm, its drivers, the policy and an operator.

    Attributes:
        true: Pose of the arm (7,) [rad].
        told: Its pose when a correct joint state was last published (7,) [rad].
        follows: Whether the arm follows commands; not while it is moved by hand.
        unseen: Largest motion by hand since the last joint state [rad].
        accepted_wrong: Whether `reset` was called on a wrong state, so that `enable` on it cannot
            be refused.
    """

    def __init__(self, interface: str) -> None:
        self.now = 100.0
        self.true = np.array(ROBOT.arm.home)
        self.told = self.true
        self.follows = True
        self.unseen = 0.0
        self.cameras = True
        self.accepted_wrong = False
        self.policy = Policy()
        values = {
            **defaults(POLICY_PARAMETERS),
            "action_interface": interface,
            "command_rate": 1 / PERIOD,
        }
        values |= {"instruction": "push the red cube", "frozen_image_timeout": 0.0}
        self.setup = policy_setup.make_setup(
            values, lambda: None, 0.0, lambda *_, **__: self.policy
        )
        self.drivers = [Driver(self, (*ARM, *FINGERS), 0.0)]
        self.sent: list[tuple[float, Any]] = []
        self._last: Decision | None = None
        self._tick_at = self.now + 0.011
        self._image_at = self.now + 0.005
        self._images = 0
        self._was_silent = True
        self.run(0.4)

    # ---- events ----------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = min([self._tick_at, self._image_at, *(driver.due for driver in self.drivers)])
            if due >= end:
                break
            self.now = self.policy.now = due
            if due == self._tick_at:
                self._tick()
            elif due == self._image_at:
                self._show()
            else:
                next(driver for driver in self.drivers if driver.due == due).publish()
        self.now = self.policy.now = end
        for driver in self.drivers:  # those that were silent
            driver.due = max(driver.due, end)

    def hear(self, message: JointState, number: int) -> None:
        setup = self.setup
        restarted = setup.sources.take(message.name, number, self.now)
        if restarted:
            setup.controller.interrupt(f"the publisher of {restarted} restarted")
        setup.safety.measure(*setup.observations.take_joints(message))

    def pause(self, seconds: float, moved: float, zeros: int) -> None:
        """Stop joint states for a time; the arm then moved, or the first states are wrong."""
        heard = self.drivers
        self.drivers = []
        self.run(seconds)
        self._push(moved)
        self.drivers = heard
        for driver in heard:
            driver.due = self.now
        self.wrong(zeros * PERIOD)

    def wrong(self, seconds: float) -> None:
        """Publish all joints as zero for a time."""
        for driver in self.drivers:
            driver.wrong = np.zeros(len(ARM))
        self.run(seconds)
        for driver in self.drivers:
            driver.wrong = None

    def restart(self, zeros: int) -> None:
        """Restart the driver's process."""
        for driver in self.drivers:
            driver.number = 0
        self.pause(0.5, 0.0, zeros)

    def second(self, seconds: float, offset: float) -> None:
        """Let another node publish another pose of the same joints."""
        other = Driver(self, (*ARM, *FINGERS), 0.3 * PERIOD)
        other.wrong = np.zeros(len(ARM)) if offset > 1.0 else self.true + offset
        self.drivers = [*self.drivers, other]
        end = self.now + seconds
        while self.now < end:
            self.run(0.2)
            shared = self.setup.sources.shared(len(self.drivers), self.now)
            self.setup.controller.note_conflict(f"two publish {shared}" if shared else None)
        self.drivers = self.drivers[:-1]
        self.run(0.2)
        self.setup.controller.note_conflict(None)

    def disjoint(self, seconds: float) -> None:
        """Give arm and gripper separate drivers for a time."""
        before = self.drivers
        self.drivers = [Driver(self, ARM, 0.0), Driver(self, FINGERS, 0.4 * PERIOD)]
        for driver in self.drivers:
            driver.number = before[0].number
        self.run(seconds)
        before[0].number = max(driver.number for driver in self.drivers)
        before[0].due = self.now
        self.drivers = before

    def hand(self, way: float) -> None:
        """Move the arm by hand, at 1 rad/s."""
        self.follows = False
        self.unseen = PERIOD
        for _ in range(int(abs(way) / PERIOD)):
            self._push(np.sign(way) * PERIOD)
            self.run(PERIOD)
        self.follows = True
        self.unseen = 0.0

    def blind(self, seconds: float) -> None:
        """Stop images for a time."""
        self.cameras = False
        self.run(seconds)
        self.cameras = True

    def operate(self, what: str, while_wrong: int) -> None:
        """Call a service as an operator, perhaps while the joint states are wrong."""
        if while_wrong:
            for driver in self.drivers:
                driver.wrong = np.zeros(len(ARM))
            self.run(while_wrong * PERIOD)
        controller = self.setup.controller
        if what == "reset":
            self.accepted_wrong = bool(while_wrong)
            controller.reset()
        elif what == "estop":
            controller.estop("operator")
        elif what == "disable":
            controller.disable()
        elif not (while_wrong and self.accepted_wrong):
            controller.enable(self.now)
        self.run(2 * PERIOD)
        for driver in self.drivers:
            driver.wrong = None

    def _push(self, way: float) -> None:
        """Move every joint by `way` [rad], within its limits."""
        self.true = np.clip(self.true + way, self.setup.arm.low + 0.05, self.setup.arm.high - 0.05)

    # ---- the node --------------------------------------------------------------------------------

    def _show(self) -> None:
        self._image_at += 0.05
        if not self.cameras:
            return
        self._images += 1
        for camera in self.setup.observations.cameras:
            pixels = np.full((96, 96, 3), self._images % 200, np.uint8)
            pixels[0, 0] = 255
            camera.take(serialize_message(array_to_image(pixels, stamp(self.now), "")))
        self.setup.controller.observed(self.now)

    def _tick(self) -> None:
        self._tick_at += PERIOD
        controller = self.setup.controller
        controller.receive(self.now)
        decision = controller.tick(self.now, self.now)
        message = command_message(self.setup, decision, self._last, stamp(self.now))
        self._last = decision
        if message is not None:
            self.sent.append((self.now, message))
            self._check(message)
            if self.follows:
                self._obey(message)
        self._was_silent = message is None
        controller.after_tick(self.now)

    def _check(self, message: Any) -> None:
        """Check the property."""
        if hasattr(message, "twist"):
            moves = any(np.ravel(vector(message.twist)))
            assert not (moves and self._was_silent), "the first twist is not zero"
            known = self.setup.safety.measured
            assert known is not None
            # A twist has no pose of its own, so the pose that it started from must be true.
            assert not moves or (np.abs(known - self.told) <= STEP + 1e-6).all()
            return
        points = (
            [point.positions for point in message.points]
            if hasattr(message, "points")
            else [message.data]
        )
        for point in points:
            off = np.abs(np.array(point) - self.true)
            where = f"{off.max():.3f} rad from the true pose at {self.now:.2f} s"
            assert (off <= STEP + self.unseen + 1e-6).all(), where

    def _obey(self, message: Any) -> None:
        if not hasattr(message, "twist"):
            self.true = np.array(
                message.points[0].positions if hasattr(message, "points") else message.data
            )
            return
        servo = ServoTwist(arm_model(), self.now - PERIOD, self.true)
        linear, angular = vector(message.twist)
        servo.command(linear, angular, self.now + PERIOD)
        pose = servo.setpoint(self.now)
        assert pose is not None
        self.true = self.true + np.clip(pose - self.true, -FASTEST * PERIOD, FASTEST * PERIOD)


def vector(twist: Any) -> np.ndarray:
    """Return linear and angular velocity (2, 3)."""
    return np.array([[part.x, part.y, part.z] for part in (twist.linear, twist.angular)])


def stamp(now: float) -> Time:
    return Time(sec=int(now), nanosec=int(1e9 * (now % 1)))


MOVED = st.sampled_from([0.0, 0.0, 0.02, 0.6, -1.2])
MOMENTS = st.sampled_from([0, 0, 1, 2, 5, 12, 30])  # numbers of states
EVENT = st.one_of(
    st.tuples(st.just("run"), st.sampled_from([0.05, 0.3, 1.0])),
    st.tuples(st.just("pause"), st.sampled_from([0.05, 0.15, 0.4, 1.0, 6.0]), MOVED, MOMENTS),
    st.tuples(st.just("wrong"), st.sampled_from([0.02, 0.1, 0.5])),
    st.tuples(st.just("restart"), MOMENTS),
    st.tuples(st.just("second"), st.sampled_from([0.2, 1.0]), st.sampled_from([0.04, 0.4, 2.0])),
    st.tuples(st.just("disjoint"), st.sampled_from([0.3, 1.0])),
    st.tuples(st.just("hand"), st.sampled_from([0.1, 0.6, -0.6])),
    st.tuples(st.just("blind"), st.sampled_from([0.3, 0.7, 6.0])),
    st.tuples(
        st.just("operate"),
        st.sampled_from(["enable", "enable", "enable", "reset", "estop", "disable"]),
        MOMENTS,
    ),
)


@pytest.mark.parametrize(
    "interface",
    [
        "forward_position",
        pytest.param("joint_trajectory", marks=pytest.mark.slow),
        pytest.param("servo_twist", marks=pytest.mark.slow),
    ],
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(events=st.lists(EVENT, min_size=1, max_size=SEQUENCE))
def test_no_command_is_further_than_a_step_from_the_true_pose(
    interface: str, events: list[tuple[Any, ...]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_setup, "arm_model", lambda robot: arm_model())
        world = World(interface)
        assert world.setup.controller.enable(world.now) is None
        world.run(0.5)
        assert world.sent
        for name, *values in events:
            getattr(world, name)(*values)
            world.run(0.3)
        # An operator always regains control of the arm.
        world.run(0.5)
        world.setup.controller.reset()
        assert world.setup.controller.enable(world.now) is None
        count = len(world.sent)
        world.run(1.0)
        assert len(world.sent) > count
        assert world.setup.controller.hold is None
