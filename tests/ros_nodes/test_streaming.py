"""What streams commands, with real publishers of other nodes: conflicts, and a clock that stops."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from ceed_vla.ros_nodes.robot.messages import clock_time
from ceed_vla.ros_nodes.robot.parameters import defaults
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.policy_setup import make_setup
from ceed_vla.ros_nodes.robot.streaming import Streaming

TOPIC = "forward_position_controller/commands"
STEADY = Clock(clock_type=ClockType.STEADY_TIME)


class Desk:
    """A policy node whose policy never loads, an arm at rest, and another node."""

    def __init__(self, simulated: bool) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=10 + os.getpid() % 90)
        given = [Parameter("use_sim_time", value=simulated)]
        self.node = Node("policy", context=self._context, parameter_overrides=given)
        self.node.declare_parameter("dry_run", False)
        self.other = Node("teleop", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._executor.add_node(self.other)
        worker = SimpleNamespace(
            ready=False, failed=None, begin=lambda: None, poll=lambda: None, idle=False
        )
        values = {**defaults(POLICY_PARAMETERS), "instruction": "x"}
        self.setup = make_setup(values, lambda: None, 0.02, lambda *_, **__: worker)
        self.told: list[str] = []
        self.streaming: Streaming | None = None
        self.ticks = simulated  # whether simulated time goes on
        self._time = 10**12  # [ns]
        self._clock = self.other.create_publisher(ClockMessage, "/clock", 10)
        self.node.create_timer(0.01, self._measure, clock=STEADY)
        self.other.create_timer(0.01, self._tick, clock=STEADY)

    def _measure(self) -> None:
        robot = self.setup.robot
        message = JointState(name=[*robot.arm.joints, *robot.gripper.joints])
        message.position = [*robot.arm.home, 0.04, 0.04]
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.setup.safety.measure(*self.setup.observations.take_joints(message))

    def _tick(self) -> None:
        if self.ticks:
            self._time += 10**7
            seconds, rest = divmod(self._time, 10**9)
            message = ClockMessage()
            message.clock.sec, message.clock.nanosec = seconds, rest
            self._clock.publish(message)

    def start(self) -> Any:
        """Activate and enable; return why that is refused."""
        told = lambda: self.told.append(str(self.setup.controller.state))  # noqa: E731
        self.streaming = Streaming(self.node, self.setup, STEADY, told)
        return self.setup.controller.enable(clock_time(self.node))

    def wait(self, until: Callable[[], object], what: str, timeout: float = 20.0) -> None:
        end = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < end, f"waited {timeout} s for {what}"
            self._executor.spin_once(timeout_sec=0.02)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > end, "time", seconds + 20.0)

    def close(self) -> None:
        if self.streaming is not None:
            self.streaming.end()
        for node in (self.node, self.other):
            node.destroy_node()
        rclpy.try_shutdown(context=self._context)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Desk]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    made = Desk(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("desk", [False], indirect=True)
def test_an_arm_that_is_commanded_already_gets_no_command(desk: Desk) -> None:
    sent: list[Float64MultiArray] = []
    desk.other.create_publisher(Float64MultiArray, TOPIC, 10)
    desk.other.create_subscription(Float64MultiArray, TOPIC, sent.append, 10)
    desk.wait(lambda: desk.node.count_publishers(f"/{TOPIC}"), "the other commander")
    desk.spin(0.5)  # until the arm has settled
    refused = desk.start()
    assert refused is not None
    assert refused.code == "conflict"
    desk.spin(0.5)
    assert sent == []


@pytest.mark.parametrize("desk", [True], indirect=True)
def test_a_clock_that_stops_is_told(desk: Desk) -> None:
    desk.spin(1.0)
    assert desk.start() is None
    desk.wait(lambda: desk.told, "a tick")
    desk.ticks = False
    desk.wait(lambda: desk.told[-1].startswith("holding: clock"), "the state on its topic")
