"""Faults between real processes: the arm comes to rest, diagnostics name the cause, and motion
resumes by itself.

The simulated robot, the policy node, and this process, which forwards the robot's messages and can
change them on the way. One policy node runs through all faults that need no restart; faults that
need a separate node are in `test_faults_of_the_node`. `test_policy_node` has the short versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

import robots_page
from rcl_interfaces.srv import GetParameters
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool

from ceed_vla.ros_nodes.robot.messages import SENSOR, array_to_image
from tests.helpers.fault_bench import COMMANDS, RELAYED, Bench, lost
from tests.ros_nodes.conftest import Graph

# minutes in real time, with both cores
pytestmark = [pytest.mark.slow, pytest.mark.timed]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One policy node for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        graph = Graph(tmp_path_factory.mktemp("faults"))
        try:
            made = Bench(graph)
            made.status.state("disabled")
            yield made
        finally:
            graph.close()


def other_size(message: Image) -> Image:
    return array_to_image(np.zeros((64, 80, 3), np.uint8), message.header.stamp, "front")


def with_positions(
    change: Callable[[np.ndarray], np.ndarray],
) -> Callable[[JointState], JointState]:
    """Return a change of joint states that replaces the positions (9,)."""

    def spoil(message: JointState) -> JointState:
        message.position = change(np.array(message.position)).tolist()
        return message

    return spoil


def with_names(change: Callable[[list[str]], list[str]]) -> Callable[[JointState], JointState]:
    """Return a change of joint states that replaces the names."""

    def spoil(message: JointState) -> JointState:
        message.name = change(list(message.name))
        return message

    return spoil


def from_the_future(message: JointState) -> JointState:
    """Shift the stamp, as if the clock of this computer had been set back."""
    message.header.stamp.sec += 60
    return message


@pytest.mark.parametrize(
    ("part", "spoil", "told"),
    [
        pytest.param("joints", lost, ("stale", "joint_states is"), id="joint states stop"),
        pytest.param(
            "joints",
            with_positions(lambda q: np.where(np.arange(9) == 4, np.nan, q)),
            ("bad_joint_states", "joint5", "not finite"),
            id="NaN in state",
        ),
        pytest.param("image", other_size, ("bad_image", "80 x 64", "96 x 96"), id="size"),
        pytest.param(
            "joints",
            with_names(lambda names: [f"ur_{name}" for name in names]),
            ("bad_joint_states", "lacks", "joint1", "ur_joint1"),
            id="wrong joint names",
        ),
        pytest.param("joints", from_the_future, ("clock", "in the future"), id="clock"),
    ],
)
def test_spoilt_inputs_stop_the_arm_and_it_goes_on_after_them(
    bench: Bench, part: str, spoil: Any, told: tuple[str, ...]
) -> None:
    bench.begin(seed=1)
    since = len(bench.commands)
    setattr(bench, part, spoil)
    bench.status.state("holding", *told)
    bench.check_rest()
    bench.repair()
    bench.check_goes_on(since)


@pytest.mark.realtime
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(with_positions(lambda q: q + (np.arange(9) == 0)), id="jumped"),
        pytest.param(with_positions(lambda q: q[[0, 3, 2, 1, *range(4, 9)]]), id="swapped"),
        pytest.param(with_positions(np.degrees), id="in degrees"),
    ],
)
def test_joint_states_that_cannot_be_true_stop_the_arm_until_somebody_enables_it(
    bench: Bench, spoil: Any
) -> None:
    bench.begin(seed=1)
    since = len(bench.commands)
    bench.joints = spoil
    bench.status.state("holding", "implausible_joint_states: joint")
    bench.check_rest()
    bench.repair()
    bench.graph.spin(1.0)
    bench.status.state("holding", "implausible_joint_states: joint")
    bench.check_rest()
    bench.enable()
    bench.check_goes_on(since)


@pytest.mark.realtime
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("red " * 100, "the instruction"),  # more words than the policy accepts
        pytest.param("x" * 10_000, "10000 characters; at most 500"),
        pytest.param("xyzzy plugh", "0 of the 2 words"),
        pytest.param("move\x1b[2J the red cube", "control characters"),
    ],
)
def test_an_instruction_that_is_refused_stops_the_arm_and_fills_no_log(
    bench: Bench, text: str, told: str
) -> None:
    bench.begin(seed=3)
    before = len(bench.graph.output("policy_node"))
    bench.instruction.publish(String(data=text))
    values = bench.status.wait(
        lambda message, _: message.startswith("bad_instruction") and told in message.lower(),
        "the hold",
    )
    assert values["state"] == "holding"
    assert max(map(len, values.values())) <= 200
    bench.check_rest()
    bench.graph.spin(2.0)
    said = bench.graph.output("policy_node")[before:]
    assert "Traceback" not in said
    assert len(said) < 2000
    shown = bench.graph.call(
        "/policy/get_parameters", GetParameters, GetParameters.Request(names=["instruction"])
    )
    assert len(shown.values[0].string_value) <= 500
    bench.instruction.publish(String(data="move the red cube into the bin"))
    bench.check_goes_on()


def test_topics_services_and_diagnostics_are_the_documented_ones(bench: Bench) -> None:
    bench.begin(seed=1)
    values = bench.status.state("moving")
    node = bench.graph.node
    page = robots_page.HOLDS_PAGE.read_text(encoding="utf-8")
    moved = {"/relay/front": "/front/image_raw", "/relay/joint_states": "/joint_states"}
    interfaces = ("/joint_trajectory_controller/joint_trajectory", "/servo_node/delta_twist_cmds")
    for name, rows, absent in (
        (
            "policy",
            robots_page.policy_topics(),
            (*interfaces, *(f"/{name}" for name in robots_page.DRY)),
        ),
        ("sim", robots_page.sim_topics(), ("/clock", "/sim/expert")),
    ):
        there = {
            robots_page.IN: node.get_subscriber_names_and_types_by_node(name, "/"),
            robots_page.OUT: node.get_publisher_names_and_types_by_node(name, "/"),
            robots_page.SERVICE: node.get_service_names_and_types_by_node(name, "/"),
        }
        found = {
            (moved.get(topic, topic), direction, kind)
            for direction, pairs in there.items()
            for topic, kinds in pairs
            for kind in kinds
        }
        documented = {(f"/{row[0]}", row[1], row[2]) for row in rows}
        assert documented - found == {row for row in documented if row[0] in absent}
        # of every node
        undocumented = {row for row in found - documented if "rcl_interfaces" not in row[2]}
        assert {row[0] for row in undocumented} <= {
            f"/{name}/{own}"
            for own in (
                *(
                    "transition_event",
                    "get_state",
                    "get_available_states",
                    "get_available_transitions",
                ),
                *("get_transition_graph", "get_type_description"),
            )
        }
    for key in set(values) - {"message"}:
        stem = re.sub(r"_p\d+(_ms)?$|\..*", "", key)
        assert f"`{stem}" in page, key


def test_a_new_instruction_in_mid_chunk_moves_on_and_an_empty_one_holds(bench: Bench) -> None:
    bench.begin(seed=3)
    since = len(bench.commands)
    bench.instruction.publish(String(data="push the red cube to the left edge"))
    values = bench.status.wait(
        lambda _, values: values.get("instruction", "").startswith("push"), "the new instruction"
    )
    assert values["state"] == "moving"
    bench.instruction.publish(String(data=""))
    bench.status.state("holding", "no_instruction")
    bench.check_rest()
    bench.instruction.publish(String(data="move the red cube into the bin"))
    bench.check_goes_on(since)


def test_two_policy_nodes_both_hold_until_one_is_gone(bench: Bench) -> None:
    bench.begin(seed=4)
    other = ("-r", "__node:=second", "-p", "autostart:=true", "-p", "instruction:=stack the cubes")
    bench.graph.start("policy_node2", *RELAYED, *other)
    bench.status.state("disabled", "conflict: /second publishes on", COMMANDS)
    bench.check_rest()
    answer = bench.graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
    assert answer.message.startswith("conflict: /second")
    assert bench.graph.stop("policy_node2") == 0
    bench.status.state("disabled", "there was a conflict: /second")
    bench.check_rest()
    bench.enable()
    bench.check_goes_on()


@pytest.mark.realtime
def test_a_second_publisher_of_the_same_joints_is_a_conflict_and_one_of_others_is_none(
    bench: Bench,
) -> None:
    bench.begin(seed=1)
    node = bench.graph.node
    other = node.create_publisher(JointState, "/relay/joint_states", SENSOR)
    joints = [f"joint{number}" for number in range(1, 8)]
    names = ["gripper_of_another_arm"]

    def publish() -> None:
        message = JointState(name=names, position=[0.0] * len(names))
        message.header.stamp = node.get_clock().now().to_msg()
        other.publish(message)

    timer = node.create_timer(0.02, publish)
    try:
        bench.graph.spin(1.0)
        bench.status.state("moving")
        since = len(bench.commands)
        true = np.array(bench.states[-1].position[:7])
        names[:] = joints
        bench.status.state("disabled", "conflict: 2 publishers of /relay/joint_states send joint1")
        bench.status.state("disabled", "the candidates are /test;")
        bench.check_rest()
        answer = bench.graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
        assert not answer.success
        assert answer.message.startswith("conflict")
        # If it moved until then, not towards zero.
        for _, command in bench.commands[since:]:
            assert np.abs(np.array(command) - true).max() < 0.6
    finally:
        node.destroy_timer(timer)
        node.destroy_publisher(other)
    bench.status.wait(
        lambda message, _: (
            message.startswith("disabled") and "conflict:" not in message.split(";")[0]
        ),
        "the end of the conflict",
    )
    bench.check_rest()
    bench.enable()
    bench.check_goes_on()


@pytest.mark.realtime
def test_a_driver_that_restarts_with_zeros_moves_nothing(bench: Bench) -> None:
    """Joint states pause, and the first states afterwards contain zeros."""
    bench.begin(seed=1)
    bench.joints = lost
    bench.status.state("holding", "stale")
    true = np.array(bench.states[-1].position[:7])
    since = len(bench.commands)
    bench.joints = with_positions(np.zeros_like)
    bench.status.state("disabled", "moved_pose: joint")
    answer = bench.graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
    assert answer.message.startswith("moved_pose: joint")
    bench.repair()
    bench.graph.spin(0.5)
    bench.enable()
    bench.check_goes_on()
    early = np.array([command for _, command in bench.commands[since : since + 20]])
    assert np.abs(early - true).max() <= 0.3 + 1e-6  # limits.step
