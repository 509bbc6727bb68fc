"""The relay between the gripper's topic and an action, with an action type that ships with ROS."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from rclpy.action import ActionServer, GoalResponse
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.gripper_relay import GripperRelay
from ceed_vla.ros_nodes.robot.messages import COMMAND
from ceed_vla.ros_nodes.robot.tasks.action import RunPolicyFields
from ceed_vla.ros_nodes.robot.tasks.runner import Outcome, TaskResult
from tests.ros_nodes.conftest import ROOT

fibonacci = pytest.importorskip("test_msgs.action", reason="ros-test-msgs").Fibonacci


class CountingRelay(GripperRelay):
    """Goals are whole millimetres; a sequence ends with the driver's position."""

    def make_goal(self, position: float) -> Any:
        return fibonacci.Goal(order=round(position))

    def position_of(self, message: Any) -> float | None:
        return float(message.sequence[-1]) if message.sequence else None


@contextmanager
def relaying(graph: Any, **values: Any) -> Iterator[tuple[CountingRelay, Any]]:
    """A relay to an action of Fibonacci, and a publisher of openings that it hears."""
    given = {"action_type": "test_msgs/action/Fibonacci", "joint": "gripper", **values}
    overrides = [Parameter(name, value=value) for name, value in given.items()]
    relay = CountingRelay(context=graph.node.context, parameter_overrides=overrides)
    graph._executor.add_node(relay)
    try:
        topic = graph.node.create_publisher(
            Float64MultiArray, "/gripper_controller/commands", COMMAND
        )
        graph.wait(topic.get_subscription_count, "the relay")
        yield relay, topic
    finally:
        graph._executor.remove_node(relay)
        relay.destroy_node()


def driver(graph: Any, execute: Callable[[Any], Any], **callbacks: Any) -> ActionServer:
    action = "/gripper_controller/gripper_cmd"
    return ActionServer(graph.node, fibonacci, action, execute_callback=execute, **callbacks)


def test_openings_are_goals_and_positions_come_back(graph: Any) -> None:
    goals: list[int] = []
    refuses: list[bool] = []

    def execute(handle: Any) -> Any:
        goals.append(handle.request.order)
        handle.publish_feedback(fibonacci.Feedback(sequence=[handle.request.order // 2]))
        handle.succeed()
        return fibonacci.Result(sequence=[handle.request.order])

    def answer(goal: Any) -> GoalResponse:
        return GoalResponse.REJECT if refuses else GoalResponse.ACCEPT

    with relaying(graph, scale=-1000.0, offset=85.0) as (_, topic):
        driver(graph, execute, goal_callback=answer)
        states = graph.listen("/joint_states", JointState, COMMAND)
        for opening in (0.085, 0.085, 0.0854, 0.04):
            topic.publish(Float64MultiArray(data=[opening]))
            graph.spin(0.3)
        graph.wait(lambda: len(goals) == 2, "two goals")
        assert goals == [0, 45]  # the same opening is not sent again
        graph.wait(lambda: states and states[-1].position[0] == pytest.approx(0.04), "the position")
        assert states[-1].name == ["gripper"]
        heard = len(states)
        graph.spin(0.5)
        assert len(states) > heard + 10  # at rest, too
        for wrong in ([], [float("nan")], [0.1, 0.2]):
            topic.publish(Float64MultiArray(data=wrong))
        refuses.append(True)
        topic.publish(Float64MultiArray(data=[0.0]))
        graph.spin(0.3)
        assert len(goals) == 2
        refuses.clear()
        topic.publish(Float64MultiArray(data=[0.0]))  # as the policy node repeats it
        graph.wait(lambda: goals[-1] == 85, "the refused opening to be sent again")


def test_the_result_of_a_replaced_goal_is_no_position(graph: Any) -> None:
    def execute(handle: Any) -> Any:
        if handle.request.order == 80:  # as ros2_control ends it
            handle.abort()
            return fibonacci.Result(sequence=[0])
        handle.succeed()
        return fibonacci.Result(sequence=[handle.request.order])

    with relaying(graph, scale=1000.0) as (_, topic):
        driver(graph, execute)
        states = graph.listen("/joint_states", JointState, COMMAND)
        for opening in (0.06, 0.08, 0.04):
            topic.publish(Float64MultiArray(data=[opening]))
            graph.spin(0.5)
        graph.wait(lambda: states and states[-1].position[0] == pytest.approx(0.04), "the position")
        assert {round(state.position[0], 3) for state in states} == {0.06, 0.04}


def test_a_driver_that_starts_again_gets_no_old_opening(graph: Any) -> None:
    goals: list[int] = []

    def execute(handle: Any) -> Any:
        goals.append(handle.request.order)
        handle.succeed()
        return fibonacci.Result(sequence=[handle.request.order])

    with relaying(graph, scale=1000.0) as (relay, topic):
        first = driver(graph, execute)
        states = graph.listen("/joint_states", JointState, COMMAND)
        topic.publish(Float64MultiArray(data=[0.03]))
        graph.wait(lambda: goals == [30] and states, "the goal and the position")
        graph.spin(0.7)  # the opening is old before the driver ends
        first.destroy()
        graph.wait(lambda: not relay._client.server_is_ready(), "the end of the driver")
        heard = len(states)
        graph.spin(0.7)
        assert len(states) <= heard + 5  # a driver that is gone has no position
        driver(graph, execute)
        graph.wait(relay._client.server_is_ready, "the driver")
        graph.spin(0.5)
        assert goals == [30]
        assert len(states) <= heard + 5  # the driver may have moved the gripper
        topic.publish(Float64MultiArray(data=[0.03]))
        graph.wait(lambda: goals == [30, 30], "the opening that was commanded again")
        graph.wait(lambda: len(states) > heard + 5, "the position")


def test_a_missing_action_type_is_an_error(graph: Any) -> None:
    with pytest.raises(ConfigError, match="control_msgs/action/GripperCommand is not installed"):
        GripperRelay(context=graph.node.context)


def test_the_action_has_the_fields_that_the_node_fills() -> None:
    text = (ROOT / "ceed_vla_interfaces" / "action" / "RunPolicy.action").read_text()
    goal, result, feedback = (
        dict(reversed(pair) for pair in re.findall(r"^(\w+) (\w+)", part, re.MULTILINE))
        for part in text.split("---")
    )
    assert goal == {"instruction": "string", "time_limit": "float64"}
    kinds = {"bool": bool, "string": str, "float64": float}

    class Message:
        """Takes any field."""

    filled = Message()
    RunPolicyFields().fill_result(filled, TaskResult("a", "wipe", Outcome.SUCCESS, "solved", 1.5))
    assert {name: kinds[kind] for name, kind in result.items()} == {
        name: type(value) for name, value in vars(filled).items()
    }
    filled = Message()
    RunPolicyFields().fill_feedback(filled, "moving", 1.5)
    assert set(vars(filled)) == set(feedback)
