"""The policy node as a process, driven over its topics and services with the shipped student and
with a tiny ACT. `test_policy_lifecycle` has its start, lifecycle and end.
"""

from __future__ import annotations

import io
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from PIL import Image as PillowImage
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from ceed_vla.ros_nodes.robot.messages import JOINT_STATES, LATCHED, SENSOR, array_to_image, seconds
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from tests.ros_nodes.conftest import Status, tiny_act

ROBOT = load_robot_config()
ARM, HOME = ROBOT.arm.joints, ROBOT.arm.home
COMMANDS = "/forward_position_controller/commands"


class Robot:
    """Publishes a robot's inputs from the test's node, and follows the commands at the arm's speed.

    Commands that wait until this process gets the processor then do not look like a leap.

    Attributes:
        images: Whether cameras publish.
        encoding: Encoding of the images.
        state: Joint -> position [rad] or [m].
        wrong: Joint -> value in the joint states instead.
        states: Whether joint states are published.
        powered: Whether commands move the arm.
        alive: Whether images change.
        blank: Whether images have one colour.
        split: Whether arm and gripper publish separate messages.
    """

    def __init__(
        self, graph: Any, cameras: dict[str, tuple[int, int]], state: dict[str, float]
    ) -> None:
        self.state = dict(state)
        self.images = self.states = self.powered = self.alive = True
        self.split = self.blank = False
        self._taken = 0
        self._goal: dict[str, float] = {}  # joint -> commanded position that is not reached
        self._moved = time.monotonic()
        self.encoding = "rgb8"
        self.wrong: dict[str, float] = {}
        rng = np.random.default_rng(0)
        self._node = graph.node
        self._pixels = {
            topic: rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            for topic, (height, width) in cameras.items()
        }
        kinds = {topic: CompressedImage if "compressed" in topic else Image for topic in cameras}
        self._cameras = {
            topic: graph.node.create_publisher(kinds[topic], topic, SENSOR) for topic in cameras
        }
        self._joints = graph.node.create_publisher(JointState, "/joint_states", JOINT_STATES)
        graph.node.create_subscription(Float64MultiArray, COMMANDS, self._follow, 10)
        graph.node.create_timer(1 / 50, self._publish_joints)
        graph.node.create_timer(1 / 15, self._publish_images)

    def _follow(self, command: Float64MultiArray) -> None:
        if self.powered:
            self._goal = dict(zip(ARM, command.data, strict=True))

    def _move(self) -> None:
        now = time.monotonic()
        elapsed, self._moved = now - self._moved, now
        for name, velocity in zip(ARM, ROBOT.limits.velocity, strict=True):
            if name not in self._goal:
                continue
            way = self._goal[name] - self.state[name]
            if abs(way) <= velocity * elapsed:
                self.state[name] = self._goal.pop(name)
            else:
                self.state[name] += math.copysign(velocity * elapsed, way)

    def _publish_joints(self) -> None:
        self._move()
        if not self.states:
            return
        state = self.state | self.wrong
        names = list(reversed(self.state))  # another order, because joints are matched by name
        fingers = [name for name in names if "finger" in name]
        parts = (
            (fingers, [name for name in names if name not in fingers]) if self.split else (names,)
        )
        for part in parts:
            message = JointState(name=part, position=[state[name] for name in part])
            message.header.stamp = self._node.get_clock().now().to_msg()
            self._joints.publish(message)

    def _publish_images(self) -> None:
        if not self.images:
            return
        stamp = self._node.get_clock().now().to_msg()
        self._taken += self.alive
        for pixels in self._pixels.values():
            pixels[0 : None if self.blank else 1, 0 : None if self.blank else 1] = self._taken % 256
        for topic, publisher in self._cameras.items():
            if "compressed" in topic:
                file = io.BytesIO()
                PillowImage.fromarray(self._pixels[topic]).save(file, "JPEG")
                message = CompressedImage(format="jpeg", data=file.getvalue())
                message.header.stamp = stamp
            else:
                message = array_to_image(self._pixels[topic], stamp, "camera")
                message.encoding = self.encoding
            publisher.publish(message)


def tabletop(graph: Any) -> Robot:
    """The simulated arm's inputs, without the simulation: random images, fingers open."""
    state = dict(zip(ARM, HOME, strict=True)) | {"finger_left": 0.05, "finger_right": 0.05}
    return Robot(graph, {"/front/image_raw": (96, 96), "/wrist/image_raw": (96, 96)}, state)


def start(graph: Any, **parameters: Any) -> None:
    given = {"autostart": True, "instruction": "move the green cube into the bin"} | parameters
    arguments = [
        part
        for name, value in given.items()
        for part in ("-p", f"{name}:={yaml.safe_dump(value).splitlines()[0]}")
    ]
    graph.start("policy_node", *arguments)


def change_state(graph: Any, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return bool(graph.call("/policy/change_state", ChangeState, request, timeout=90.0).success)


@pytest.mark.slow
def test_streams_holds_and_recovers(graph: Any) -> None:
    robot = tabletop(graph)
    status = Status(graph)
    commands = graph.listen(COMMANDS, Float64MultiArray)
    grips = graph.listen("/gripper_controller/commands", Float64MultiArray)
    start(graph)
    status.state("moving")
    first = np.array(commands[0].data)
    np.testing.assert_allclose(first, HOME, atol=1e-6)  # begins at the arm's pose
    graph.spin(2.0)
    path = np.array([message.data for message in commands])
    assert len(path) > 100
    assert np.abs(path[-1] - first).max() > 1e-3  # and moves
    assert np.abs(np.diff(path, axis=0)).max() < 0.1  # without a jump
    graph.wait(lambda: grips, "a gripper command")
    assert set(grips[-1].data) <= {0.0, 0.1}

    robot.images = False
    status.state("holding", "stale", "front")
    before = len(commands)
    graph.wait(lambda: len(commands) > before + 20, "commands while holding")
    assert len({tuple(message.data) for message in commands[before:]}) == 1
    robot.images = True
    status.state("moving")

    robot.encoding = "mono8"
    status.state("holding", "bad_image", "'mono8'; use rgb8 or bgr8")
    robot.encoding = "rgb8"
    robot.wrong = {"joint3": float("nan")}
    status.state("holding", "bad_joint_states", "joint3")
    robot.wrong = {}
    values = status.state("moving")
    assert float(values["decode_ms_p50"]) > 0.0
    assert int(values["chunks"]) > 1
    assert "=" in values["exit_reasons"]
    assert {"holds.stale", "holds.bad_image", "clamps.velocity", "observation_age_s.front"} <= set(
        values
    )
    assert graph.stop("policy_node", signal.SIGINT) == 0


@pytest.mark.slow
def test_operator_stops_resets_enables_and_instructs(graph: Any) -> None:
    robot = tabletop(graph)
    status = Status(graph)
    commands = graph.listen(COMMANDS, Float64MultiArray)
    start(graph, start_enabled=False, instruction="")
    status.state("disabled")
    graph.spin(0.5)
    assert not commands  # a dry run sends no commands
    assert graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success
    status.state("holding", "no_instruction")
    instruction = graph.node.create_publisher(String, "/policy/instruction", LATCHED)
    instruction.publish(String(data="move the red cube into the bin"))
    assert status.state("moving")["instruction"] == "move the red cube into the bin"

    assert graph.call("/policy/estop", Trigger).success
    status.state("stopped", "~/estop")
    graph.spin(0.3)
    stopped = len(commands)
    graph.spin(0.5)
    assert len(commands) == stopped  # a stopped arm gets no commands
    refused = graph.call("/policy/enable", SetBool, SetBool.Request(data=True))
    assert not refused.success
    assert "latched" in refused.message
    assert graph.call("/policy/reset", Trigger).success
    status.state("disabled")
    moved = robot.state["joint1"] + 0.2  # the arm is moved by hand
    robot.state["joint1"] = moved
    graph.spin(0.6)
    before = len(commands)
    assert graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success
    graph.wait(lambda: len(commands) > before, "commands after enable")
    # motion continues from the arm's pose
    assert commands[before].data[0] == pytest.approx(moved, abs=1e-6)
    status.state("moving")

    refusals = graph.set_parameters(
        "/policy", command_rate=1e9, image_timeout=1.0, checkpoint="teacher"
    )
    reasons = [result.reason for result in refusals]
    assert not any(result.successful for result in refusals)
    assert "Min: 20.0, Max: 500.0" in reasons[0] or "[20, 500]" in reasons[0]
    assert "read-only" in reasons[1]
    assert "deactivate and clean up first" in reasons[2]
    assert graph.set_parameters("/policy", instruction="push the blue cube")[0].successful
    status.wait(
        lambda _, values: values.get("instruction") == "push the blue cube", "the new instruction"
    )
    assert graph.stop("policy_node", signal.SIGTERM) == 0


def enable(graph: Any, *, on: bool) -> Any:
    """Call ~/enable and return the answer."""
    return graph.call("/policy/enable", SetBool, SetBool.Request(data=on))


def check_start_without_joint_states(
    graph: Any, robot: Robot, status: Status, commands: list[Any]
) -> None:
    robot.states = False
    start(graph)
    status.state("holding", "no_joint_states")
    assert not commands
    assert "ROS domain" in graph.output("policy_node")
    assert "discovery range LOCALHOST" in graph.output("policy_node")
    robot.states = True
    status.state("moving")  # motion is enabled at the start


def check_moved_unseen_while_disabled(
    graph: Any, robot: Robot, status: Status, commands: list[Any]
) -> None:
    assert enable(graph, on=False).success
    graph.spin(0.3)
    robot.states = False
    graph.spin(0.5)
    robot.state["joint1"] = 0.4  # moved by hand, without joint states
    before = len(commands)
    refused = enable(graph, on=True)
    assert not refused.success
    assert "stale: joint_states is" in refused.message
    assert "limit is 0.20 s" in refused.message
    graph.spin(0.5)
    assert len(commands) == before
    robot.states = True
    graph.spin(0.6)
    assert len(commands) == before  # a refused request is not remembered
    refused = enable(graph, on=True)
    assert refused.message.startswith(
        "moved_pose: joint1 is at 0.4 rad, the last trusted pose has it at"
    )
    assert graph.call("/policy/reset", Trigger).success
    assert "~/reset accepts another pose: joint1 is at 0.4 rad" in graph.output("policy_node")
    assert enable(graph, on=True).success
    status.state("moving")
    assert commands[before].data[0] == pytest.approx(0.4, abs=1e-6)


def check_moved_unseen_in_motion(
    graph: Any, robot: Robot, status: Status, commands: list[Any]
) -> None:
    robot.states = False
    robot.powered = False
    status.state("holding", "stale")
    held = commands[-1].data[0]
    robot.state["joint1"] = -0.4
    before = len(commands)
    robot.states = True
    status.state("disabled", "moved_pose: joint1 is at -0.4 rad")
    later = [message.data[0] for message in commands[before:]]
    np.testing.assert_allclose(later, held, atol=1e-6)  # until they arrived; then no commands
    assert graph.call("/policy/reset", Trigger).success
    robot.powered = True
    before = len(commands)
    assert enable(graph, on=True).success
    status.state("moving")
    assert commands[before].data[0] == pytest.approx(-0.4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.realtime
def test_no_command_follows_from_a_pose_of_before(graph: Any) -> None:
    robot = tabletop(graph)
    status = Status(graph)
    commands = graph.listen(COMMANDS, Float64MultiArray)
    check_start_without_joint_states(graph, robot, status, commands)
    check_moved_unseen_while_disabled(graph, robot, status, commands)
    check_moved_unseen_in_motion(graph, robot, status, commands)
    assert graph.stop("policy_node", signal.SIGTERM) == 0


def act_robot(folder: Path) -> Path:
    """A robot of two joints, without a gripper, in degrees, with one compressed camera whose images
    are too large.
    """
    values = {
        "images": {
            "observation.images.top": {
                "topic": "top/compressed",
                "transport": "compressed",
                "resize": True,
            }
        },
        "joint_states": {"topic": "joint_states"},
        "state": {"observation.state": ["joint_positions"]},
        "arm": {"joints": ["shoulder", "elbow"], "unit": "deg"},
        "action": {"kind": "joint_position", "dt": 0.1},
        "limits": {
            "position": {"low": [-1.0, -1.0], "high": [1.0, 1.0]},
            "velocity": [0.5, 0.5],
            "step": [0.2, 0.2],
        },
        "interfaces": {
            "joint_trajectory": {"topic": "joint_trajectory_controller/joint_trajectory"}
        },
    }
    (folder / "robot.yaml").write_text(yaml.safe_dump(values))
    return folder / "robot.yaml"


@pytest.mark.slow
def test_any_lerobot_policy_drives(graph: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "act"
    tiny_act(checkpoint, joints=2, spread=20.0)
    robot = Robot(
        graph, {"/top/compressed": (120, 160)}, {"shoulder": 0.1, "elbow": -0.1, "base": 3.0}
    )
    status = Status(graph)
    topic = "/joint_trajectory_controller/joint_trajectory"
    trajectories = graph.listen(topic, JointTrajectory)

    def follow(message: JointTrajectory) -> None:
        robot.state.update(zip(message.joint_names, message.points[0].positions, strict=True))

    graph.node.create_subscription(JointTrajectory, topic, follow, 10)
    start(
        graph,
        checkpoint=str(checkpoint),
        robot_config=str(act_robot(tmp_path)),
        action_interface="joint_trajectory",
        instruction="",
    )
    values = status.state("moving")
    assert float(values["decode_ms_p50"]) > 0.0
    graph.wait(lambda: len(trajectories) > 50, "trajectories")
    first = trajectories[0].points[0].positions
    assert list(first) == pytest.approx([0.1, -0.1], abs=1e-6)
    assert any(np.abs(np.subtract(t.points[0].positions, first)).max() > 1e-3 for t in trajectories)
    for trajectory in trajectories:
        assert trajectory.joint_names == ["shoulder", "elbow"]
        assert seconds(trajectory.header.stamp) == 0.0
        times = [seconds(point.time_from_start) for point in trajectory.points]
        assert times[0] > 0.0
        assert np.all(np.diff(times) > 0.0)
        assert list(trajectory.points[-1].velocities) == [0.0, 0.0]
        for point in trajectory.points:
            assert np.abs(point.positions).max() <= 1.0  # its limits
            assert np.abs(point.velocities).max() <= 0.5 + 1e-6
    assert graph.stop("policy_node", signal.SIGTERM) == 0
