"""Faults that need a separate policy node: a signal during inference, a clock set back."""

from __future__ import annotations

import signal
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

from ceed_vla.ros_nodes.robot.messages import SENSOR
from tests.helpers.fault_bench import Bench, lost
from tests.ros_nodes.conftest import Graph


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "thread"])
def test_sigterm_during_inference_ends_it_with_the_arm_at_rest(graph: Graph, mode: str) -> None:
    bench = Bench(graph, "-p", "inference_delay:=0.6", "-p", f"inference_mode:={mode}")
    bench.status.state("disabled")
    bench.begin(seed=5)  # answers take so long that the next one is always pending
    assert graph.stop("policy_node", signal.SIGTERM, timeout=10.0) == 0
    bench.check_rest()
    assert "Traceback" not in graph.output("policy_node")


@pytest.mark.slow
def test_simulated_time_that_jumps_back_holds_until_new_inputs_come(graph: Graph) -> None:
    bench = Bench(graph, "-r", "wrist/image_raw:=/relay/wrist", "-p", "use_sim_time:=true")
    clock = graph.node.create_publisher(Clock, "/clock", SENSOR)
    now = [1000.0]

    def stamped(message: Any) -> Any:
        message.header.stamp.sec = int(now[0])
        message.header.stamp.nanosec = int(1e9 * (now[0] % 1))
        return message

    def advance() -> None:
        now[0] += 0.01
        message = Clock()
        message.clock.sec = int(now[0])
        message.clock.nanosec = int(1e9 * (now[0] % 1))
        clock.publish(message)

    graph.node.create_timer(0.01, advance)
    bench.repair = lambda: None  # type: ignore[method-assign]
    bench.image = bench.joints = stamped
    wrist = graph.node.create_publisher(Image, "/relay/wrist", SENSOR)
    graph.node.create_subscription(
        Image, "/wrist/image_raw", lambda m: wrist.publish(stamped(m)), SENSOR
    )
    bench.status.state("disabled")
    bench.begin(seed=6)
    bench.status.state("moving")
    bench.image = bench.joints = lost  # no new inputs, so that the cause stays visible
    now[0] -= 500.0
    bench.status.state("holding", "clock")
    bench.check_rest()
    bench.image = bench.joints = stamped
    bench.check_goes_on()
