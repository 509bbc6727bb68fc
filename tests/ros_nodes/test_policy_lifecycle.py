"""The policy node as a process: start and end, lifecycle, and refusals at the start."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool

from tests.ros_nodes.conftest import Status
from tests.ros_nodes.test_policy_node import COMMANDS, ROBOT, change_state, start, tabletop


def state_of(graph: Any) -> int:
    """Return the lifecycle state of the policy node."""
    return int(graph.call("/policy/get_state", GetState).current_state.id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("config.json", "{", "configure failed: "),
        ("robot.yaml", "[" * 3000, "robot.yaml cannot be read"),
        pytest.param("robot.yaml", "arm: {joints: [a]}", "is missing", marks=pytest.mark.slow),
        pytest.param(
            "robot.yaml", "topic", "topic.xml has no site or body", marks=pytest.mark.slow
        ),
    ],
)
def test_a_node_that_starts_by_itself_ends_if_it_cannot(
    graph: Any, tmp_path: Path, file: str, text: str, told: str
) -> None:
    (tmp_path / "topic.xml").write_text(
        "<mujoco><worldbody><body><joint name='joint1'/></body></worldbody></mujoco>"
    )
    if text == "topic":
        values = yaml.safe_load(ROBOT.source.read_text())
        values["arm"] |= {"model": "topic.xml", "joints": ["joint1"], "home": [0.0], "tcp": "a"}
        values["limits"] = {"velocity": [1.0], "step": [1.0]}
        text = yaml.safe_dump(values)
    (tmp_path / file).write_text(text)
    name = "robot_config" if file == "robot.yaml" else "checkpoint"
    start(graph, **{name: str(tmp_path / file if file == "robot.yaml" else tmp_path)})
    assert graph.processes["policy_node"].wait(60) == 1
    output = graph.output("policy_node")
    assert told in output
    errors = [line for line in output.splitlines() if "[INFO]" not in line]
    assert len(errors) == 1, output
    assert errors[0].startswith("policy_node: error: configure failed: ")


@pytest.mark.slow
@pytest.mark.realtime  # a busy middleware may lose the answer of a service
def test_bad_checkpoint_is_no_crash_and_the_lifecycle_works(graph: Any, tmp_path: Path) -> None:
    tabletop(graph)
    status = Status(graph)
    start(graph, autostart=False, checkpoint=str(tmp_path / "none"))
    assert not change_state(graph, Transition.TRANSITION_CONFIGURE)
    found = status.wait(lambda message, _: "configure failed" in message, "the failure")
    assert found["state"] == "unconfigured"
    assert "No checkpoint folder at" in found["message"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert graph.set_parameters("/policy", checkpoint=str(broken))[0].successful
    assert not change_state(graph, Transition.TRANSITION_CONFIGURE)
    status.wait(
        lambda message, _: "configure failed" in message and "broken" in message,
        "the other failure",
    )

    assert graph.set_parameters("/policy", checkpoint="student")[0].successful
    assert change_state(graph, Transition.TRANSITION_CONFIGURE)
    assert not graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success
    commands = graph.listen(COMMANDS, Float64MultiArray)
    assert change_state(graph, Transition.TRANSITION_ACTIVATE)
    status.state("moving")
    assert change_state(graph, Transition.TRANSITION_DEACTIVATE)
    graph.spin(0.3)
    sent = len(commands)
    assert sent
    graph.spin(0.5)
    assert len(commands) == sent
    # what an operator forbade, no activation allows, despite start_enabled
    assert graph.call("/policy/enable", SetBool, SetBool.Request(data=False)).success
    assert change_state(graph, Transition.TRANSITION_ACTIVATE)
    graph.spin(0.5)
    assert len(commands) == sent
    assert graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success
    status.state("moving")
    assert change_state(graph, Transition.TRANSITION_DEACTIVATE)
    assert change_state(graph, Transition.TRANSITION_CLEANUP)
    assert state_of(graph) == State.PRIMARY_STATE_UNCONFIGURED
    assert change_state(graph, Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
    assert graph.stop("policy_node", signal.SIGTERM) == 0


@pytest.mark.slow
def test_an_impossible_transition_is_refused_and_changes_nothing(graph: Any) -> None:
    possible = {
        State.PRIMARY_STATE_UNCONFIGURED: {1, 5},
        State.PRIMARY_STATE_INACTIVE: {2, 3, 6},
        State.PRIMARY_STATE_ACTIVE: {4, 7},
    }
    tabletop(graph)
    start(graph, autostart=False)
    assert state_of(graph) == State.PRIMARY_STATE_UNCONFIGURED
    client = graph.node.create_client(ChangeState, "/policy/change_state")
    for state, transitions in possible.items():
        for number in set(range(100)) - transitions:
            future = client.call_async(ChangeState.Request(transition=Transition(id=number)))
            graph.wait(future.done, f"an answer to {number}")
            assert not future.result().success, (state, number)
        assert state_of(graph) == state
        onward = {1: Transition.TRANSITION_CONFIGURE, 2: Transition.TRANSITION_ACTIVATE}.get(state)
        assert onward is None or change_state(graph, onward)
    request = ChangeState.Request(transition=Transition(label="fly"))
    assert not graph.call("/policy/change_state", ChangeState, request).success
    assert "Refused the lifecycle transition 'fly': the node is active" in graph.output(
        "policy_node"
    )
    assert "Traceback" not in graph.output("policy_node")
    assert change_state(graph, Transition.TRANSITION_DEACTIVATE)
    assert graph.stop("policy_node", signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"checkpiont": "teacher"},
            "'checkpiont' is unknown to the node policy; it has checkpoint",
        ),
        (
            {"command_rate": 1e9},
            "command_rate is 1000000000.0; it must be a finite number in [20, 500].",
        ),
        ({"action_interface": "wheels"}, "one of forward_position, joint_trajectory, servo_twist"),
    ],
)
def test_bad_parameter_at_the_start(graph: Any, parameters: dict[str, Any], message: str) -> None:
    start(graph, **parameters)
    assert graph.processes["policy_node"].wait(30) == 1
    assert message in graph.output("policy_node")
    assert "Traceback" not in graph.output("policy_node")
