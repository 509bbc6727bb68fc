"""One policy drives two simulated arms; limits, holds and stops act on both."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool, Trigger

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.robot.messages import COMMAND, JOINT_STATES
from ceed_vla.ros_nodes.robot.robot_file import load_robot_config
from tests.ros_nodes.conftest import Status, tiny_act

SIDES = ("left", "right")
JOINTS = [f"joint{index + 1}" for index in range(7)]
ROBOT = f"""
images: {{observation.images.top: {{topic: left/front/image_raw, resize: true}}}}
state: {{observation.state: [joint_positions]}}
arm:
  groups:
    left: {{joints: {JOINTS}, joint_states: left/joint_states}}
    right: {{joints: {JOINTS}, joint_states: right/joint_states}}
action: {{kind: joint_delta, dt: 0.1}}
limits:
  position: {{low: {[-3.0] * 14}, high: {[4.0] * 14}}}
  velocity: {[0.5] * 14}
  step: {[0.3] * 14}
interfaces:
  forward_position:
    topic:
      left: left/forward_position_controller/commands
      right: right/forward_position_controller/commands
allow: [statistics, units, step]
"""


def file(folder: Path, text: str = ROBOT) -> Path:
    path = folder / "robot.yaml"
    path.write_text(text)
    return path


def test_the_file_of_two_arms(tmp_path: Path) -> None:
    robot = load_robot_config(file(tmp_path))
    assert robot.arm.joints == (
        *(f"left_{name}" for name in JOINTS),
        *(f"right_{name}" for name in JOINTS),
    )
    assert robot.arm.parts == {"left": slice(0, 7), "right": slice(7, 14)}
    assert robot.joint_topics == {"left/joint_states": "left_", "right/joint_states": "right_"}
    assert robot.action_dim == 14


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arm:\n", "arm:\n  joints: [a]\n", "arm.joints and groups exclude each other"),
        ("joint_states: right/", "joint_states: left/", "each with its own joint_states"),
        (
            "      right: right/forward",
            "      rigth: right/forward",
            "one topic for each of left, right",
        ),
        ("allow:", "joint_states: {topic: joint_states}\nallow:", "joint_states is unknown"),
        ("joint_delta", "ee_delta", "workspace is missing|arm.model is missing"),
    ],
)
def test_wrong_files_of_two_arms(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_robot_config(file(tmp_path, ROBOT.replace(old, new)))


class TwoArms:
    """Two simulated arms, driven by one policy of random weights."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.at: dict[str, np.ndarray] = {}
        self.commands: dict[str, int] = dict.fromkeys(SIDES, 0)
        for side in SIDES:
            self._listen(side)
        tiny_act(graph.folder / "policy", 14, 0.05)
        path = file(graph.folder)
        for number, side in enumerate(SIDES):
            graph.start(f"s{number}", "-r", f"__ns:=/{side}", "-p", "publish_instruction:=false")
        given = [f"robot_config:={path}", f"checkpoint:={graph.folder / 'policy'}"]
        given += ["autostart:=true", "start_enabled:=false"]
        graph.start("p", *(word for one in given for word in ("-p", one)))
        self.status = Status(graph)
        self.status.state("disabled")
        self.start = dict(self.at)
        assert graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success

    def _listen(self, side: str) -> None:
        def hear(message: JointState) -> None:
            self.at[side] = np.array(message.position[:7])

        def count(_: Float64MultiArray) -> None:
            self.commands[side] += 1

        node = self.graph.node
        node.create_subscription(JointState, f"/{side}/joint_states", hear, JOINT_STATES)
        topic = f"/{side}/forward_position_controller/commands"
        node.create_subscription(Float64MultiArray, topic, count, COMMAND)

    def moved(self, least: float) -> bool:
        """Whether both arms have moved by a distance [rad] since the start."""
        return all(np.abs(self.at[side] - self.start[side]).max() > least for side in SIDES)

    def still(self, seconds: float) -> bool:
        """Whether neither arm moves or is commanded for a time [s]."""
        before = {side: self.at[side].copy() for side in SIDES}
        counts = dict(self.commands)
        self.graph.spin(seconds)
        at_rest = all(np.abs(self.at[side] - before[side]).max() < 0.002 for side in SIDES)
        return at_rest and counts == self.commands


@pytest.mark.realtime
def test_one_stop_stops_both_arms(graph: Any) -> None:
    arms = TwoArms(graph)
    graph.wait(lambda: arms.moved(0.02), "motion of both arms")
    graph.call("/policy/estop", Trigger)
    graph.spin(0.3)
    assert arms.still(0.7)
    assert graph.call("/policy/reset", Trigger).success
    arms.start = dict(arms.at)
    assert graph.call("/policy/enable", SetBool, SetBool.Request(data=True)).success
    graph.wait(lambda: arms.moved(0.02), "motion after the stop")
    graph.processes["s1"].send_signal(signal.SIGSTOP)  # the right arm's driver hangs
    try:
        held = arms.status.state("holding", "lacks right_joint1")
        assert float(held["observation_age_s.joint_states"]) > 0.2
        before = arms.at["left"].copy()
        graph.spin(0.5)
        assert np.abs(arms.at["left"] - before).max() < 0.002
    finally:
        graph.processes["s1"].send_signal(signal.SIGCONT)
