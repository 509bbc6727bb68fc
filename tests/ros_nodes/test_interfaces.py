"""Commands as messages of our interfaces, and of an interface in a user's own file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from builtin_interfaces.msg import Time
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray
from workers import load_error, process_of, running

from ceed_vla.discovery import discover
from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.inference import InferenceWorker
from ceed_vla.ros_nodes.robot.interfaces.base import INTERFACES, Command, CommandedArm
from ceed_vla.ros_nodes.robot.kinematics import ModelArm
from ceed_vla.ros_nodes.robot.local_policy import local_policy
from ceed_vla.ros_nodes.robot.parameters import refusal
from ceed_vla.ros_nodes.robot.policy_parameters import POLICY_PARAMETERS
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config, packaged_config
from tests.ros_nodes.conftest import Status
from tests.ros_nodes.test_policy_node import start, tabletop

ROBOT = load_robot_config()
HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "connect-an-arm.md"
OWN = HOW_TO.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
OWN += "\nimport os, pathlib\n(pathlib.Path(__file__).parent / f'imported-{os.getpid()}').touch()\n"
PERIOD = 0.01


@pytest.fixture(scope="module")
def arm() -> CommandedArm:
    assert ROBOT.arm.model is not None
    model = ModelArm(ROBOT.arm.model, "tcp", ROBOT.arm.joints, home=ROBOT.arm.home)
    return CommandedArm(ROBOT.arm.joints, PERIOD, model.low, model.high, np.full(7, 0.3), model)


def command(arm: CommandedArm, velocity: float, lag: float = 0.0) -> Command:
    """A command at home, all joints in motion [rad/s], with the arm behind by `lag` [rad]."""
    home = np.array(ROBOT.arm.home)
    return Command(home, np.full(7, velocity), home - lag, Time(sec=3))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A robot's file with an interface that a module ``own_interface`` registers."""
    (tmp_path / "own_interface.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = yaml.safe_load(packaged_config().read_text())
    values["arm"]["model"] = str(packaged_config().parent / values["arm"]["model"])
    values["interfaces"]["milliradians"] = {"topic": "own/commands", "offset": 0.5}
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
    yield tmp_path / "robot.yaml"
    INTERFACES.pop("milliradians", None)


def test_positions_are_sent_as_they_are(arm: CommandedArm) -> None:
    message = ROBOT.interface("forward_position").message(command(arm, 1.0), arm)
    assert message.data.tolist() == list(ROBOT.arm.home)


def test_every_point_of_a_trajectory_is_within_a_step_of_the_measured_position(
    arm: CommandedArm,
) -> None:
    for speed in (-100.0, -3.0, 3.0, 100.0):
        sent = command(arm, speed)
        for point in ROBOT.interface("joint_trajectory").message(sent, arm).points:
            assert (np.abs(np.array(point.positions) - sent.measured) <= arm.step + 1e-9).all()


def test_a_trajectory_stops_by_itself_inside_the_limits(arm: CommandedArm) -> None:
    arm = replace(arm, step=np.full(7, 9.0))
    message = ROBOT.interface("joint_trajectory").message(command(arm, 100.0), arm)
    assert tuple(message.joint_names) == ROBOT.arm.joints
    first, last = message.points
    assert (first.time_from_start.nanosec, last.time_from_start.nanosec) == (
        10_000_000,
        110_000_000,
    )
    np.testing.assert_array_equal(last.velocities, np.zeros(7))
    np.testing.assert_array_equal(last.positions, arm.high)  # 5 rad further on
    part = np.linspace(0, 1, 101)[:, None]  # the controller's cubic between the points
    start, speeds, rest = (
        np.array(first.positions),
        np.array(first.velocities) * 0.1,
        np.array(last.positions),
    )
    way = (
        start * (1 + 2 * part) * (1 - part) ** 2
        + speeds * part * (1 - part) ** 2
        + rest * part**2 * (3 - 2 * part)
    )
    assert (way <= arm.high + 1e-9).all()
    slow = ROBOT.interface("joint_trajectory").message(command(arm, 0.5), arm).points[0]
    # far from the limits nothing changes
    np.testing.assert_array_equal(slow.velocities, np.full(7, 0.5))


def test_a_twist_is_the_velocity_of_the_tool_and_corrects_what_it_lacks(arm: CommandedArm) -> None:
    twists = ROBOT.interface("servo_twist")
    still = twists.message(command(arm, 0.0, lag=0.1), arm)
    assert (still.header.frame_id, still.header.stamp.sec) == ("base_link", 3)
    assert still.twist.linear.x == still.twist.angular.z == 0.0  # a hold
    assert arm.model is not None
    slow, late = command(arm, 0.01), command(arm, 0.01, lag=0.001)
    linear, angular = (
        jacobian.sum(axis=1)
        for jacobian in (arm.model.pose(slow.positions), arm.model.jacobian())[1]
    )
    for one, share in ((slow, 1.0), (late, 1.03)):  # gain 0.3 / s: 0.001 rad behind
        twist = twists.message(one, arm).twist
        got = [[vector.x, vector.y, vector.z] for vector in (twist.linear, twist.angular)]
        np.testing.assert_allclose(got, 0.01 * share * np.array([linear, angular]), atol=2e-5)
    # far behind: it does not race after the command
    halted = twists.message(command(arm, 1e-6, lag=1.0), arm).twist
    assert np.linalg.norm([halted.linear.x, halted.linear.y, halted.linear.z]) < 0.101
    assert np.linalg.norm([halted.angular.x, halted.angular.y, halted.angular.z]) < 0.301
    fast = twists.message(command(arm, 50.0), arm).twist
    assert np.linalg.norm([fast.linear.x, fast.linear.y, fast.linear.z]) == pytest.approx(1.0)
    assert np.linalg.norm([fast.angular.x, fast.angular.y, fast.angular.z]) == pytest.approx(3.0)


def test_an_interface_of_ones_own_is_one_file(own: Path, arm: CommandedArm) -> None:
    with pytest.raises(
        ConfigError, match=r"interfaces\.milliradians is unknown; the interfaces are forward_pos"
    ):
        load_robot_config(own)
    change = [Parameter("action_interface", value="milliradians")]
    assert "servo_twist" in refusal(POLICY_PARAMETERS, change, configured=False).reason
    discover("own_interface")
    message = load_robot_config(own).interface("milliradians").message(command(arm, 0.0), arm)
    np.testing.assert_allclose(message.data, 1000 * np.array(ROBOT.arm.home) + 0.5)
    assert refusal(POLICY_PARAMETERS, change, configured=False).successful
    own.write_text(own.read_text().replace("offset: 0.5", "offset: 5.0"))
    with pytest.raises(
        ConfigError, match=r"milliradians\.offset has 5\.0; it must lie in \[-1, 1\]"
    ):
        load_robot_config(own)
    own.write_text(own.read_text().replace("offset: 5.0", "offset: 0.5, speed: 1"))
    with pytest.raises(ConfigError, match="speed"):
        load_robot_config(own)


@pytest.mark.slow
def test_the_inference_process_imports_the_packages_first(own: Path) -> None:
    with running("student", discover_packages="own_interface", warmup=1) as worker:
        assert (own.parent / f"imported-{process_of(worker)}").exists()
    with closing(InferenceWorker(local_policy("student", discover_packages="nowhere"))) as worker:
        assert "discover_packages: the package 'nowhere' cannot be imported" in (
            load_error(worker) or ""
        )


@pytest.mark.slow
def test_the_node_streams_through_an_interface_of_ones_own(graph: Any, own: Path) -> None:
    robot, status = tabletop(graph), Status(graph)
    commands = graph.listen("/own/commands", Float64MultiArray)
    own_parameters = {"discover_packages": "own_interface", "action_interface": "milliradians"}
    start(graph, robot_config=str(own), decoding="jacobi", **own_parameters)
    graph.wait(lambda: commands, "commands", 120.0)
    expected = [1000 * robot.state[name] + 0.5 for name in ROBOT.arm.joints]
    np.testing.assert_allclose(commands[0].data, expected, atol=1e-3)
    assert len(list(own.parent.glob("imported-*"))) == 2  # the node and the inference process
    # no arm follows the commands here
    status.state("holding", "frozen_joint_states")
    assert graph.stop("policy_node") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "discover_packages",
            "nowhere",
            "discover_packages: the package 'nowhere' cannot be imported",
        ),
        ("decoding", "beam", "beam"),
    ],
)
def test_what_cannot_be_found_ends_the_start(graph: Any, name: str, value: str, told: str) -> None:
    start(graph, **{name: value})
    assert graph.processes["policy_node"].wait(60) == 1
    (line,) = [line for line in graph.output("policy_node").splitlines() if "error:" in line]
    assert told in line
