"""The record node beside a policy node and the simulated robot, and a bag of the same run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.ros_nodes.demo.bag import BagWriter, record
from ceed_vla.ros_nodes.record.bag_to_dataset import BagConfig, bag_to_dataset
from ceed_vla.ros_nodes.robot.messages import COMMAND, JOINT_STATES, LATCHED, SENSOR
from ceed_vla.training.inspection import InspectConfig, inspect
from tests.ros_nodes.conftest import Status


def test_the_node_imports_no_torch() -> None:
    code = "import sys, ceed_vla.ros_nodes.record.record_node; print([name for name in "
    code += "('torch', 'lerobot', 'transformers', 'pandas', 'av') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def driven(graph: Any) -> Any:
    """The simulated robot, driven by the shipped student."""
    graph.start("s", "-p", "seed:=1")
    graph.start("p", "-p", "autostart:=true", "-p", "engine:=eager")
    return graph


class Recording:
    """A record node, and what it says."""

    def __init__(self, graph: Any, root: Path, *parameters: str) -> None:
        self.graph = graph
        self.states: list[String] = graph.listen("/record/state", String, LATCHED)
        given = [f"root:={root}", "autostart:=true", *parameters]
        words = [word for one in given for word in ("-p", one)]
        graph.start("r", "-r", "~/instruction:=/policy/instruction", *words)
        self.wait("idle", 120)

    @property
    def state(self) -> str:
        return str(self.states[-1].data) if self.states else ""

    def wait(self, state: str, timeout: float = 60) -> str:
        """Wait for a state, and return its text."""
        self.graph.wait(lambda: self.state.startswith(state), f"the state {state}", timeout)
        return self.state

    def start(self) -> str:
        answer = self.graph.call("/record/start", Trigger)
        assert answer.success, answer.message
        return str(answer.message)

    def stop(self, *, success: bool = True) -> str:
        """End the episode, and return what became of it."""
        answer = self.graph.call("/record/stop", SetBool, SetBool.Request(data=success))
        assert answer.success, answer.message
        return self.wait("idle")


def same(one: FrameStore, other: FrameStore) -> None:
    """Check that two data sets have the same frames."""
    np.testing.assert_array_equal(one.state, other.state)
    np.testing.assert_array_equal(one.action, other.action)
    np.testing.assert_array_equal(one.episode, other.episode)
    assert one.tasks == other.tasks
    for name in one.images:
        np.testing.assert_array_equal(one.images[name], other.images[name])


def bag_of(graph: Any, path: Path) -> BagWriter:
    """Record all topics of the robot and the nodes in a bag."""
    bag = BagWriter(path)
    for topic, kind, qos in (
        ("/front/image_raw", Image, SENSOR),
        ("/wrist/image_raw", Image, SENSOR),
        ("/joint_states", JointState, JOINT_STATES),
        ("/policy/commanded", JointState, COMMAND),
        ("/policy/instruction", String, LATCHED),
        ("/record/episode", String, COMMAND),
    ):
        record(graph.node, bag, topic, kind, qos)
    return bag


@pytest.mark.realtime
def test_a_recording_and_a_bag_of_it_give_the_same_data(driven: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    recording = Recording(driven, root)
    Status(driven).wait(lambda _, values: values.get("state") == "moving", "motion")
    bag = bag_of(driven, tmp_path / "run.mcap")
    driven.spin(1.0)
    recording.start()
    driven.spin(3.0)
    assert "stored episode 0: " in recording.stop()
    recording.start()
    driven.spin(1.0)
    assert driven.call("/record/discard", Trigger).success
    recording.start()
    driven.spin(2.0)
    assert "stored episode 1: " in recording.stop(success=False)
    driven.spin(0.5)
    assert driven.stop("r") == 0
    bag.close()

    summary = bag_to_dataset(BagConfig(tmp_path / "run.mcap", tmp_path / "again"))
    recorded, converted = open_dataset(root), open_dataset(tmp_path / "again")
    assert (summary.episodes, summary.frames) == (2, len(recorded))
    same(recorded, converted)
    assert not inspect(InspectConfig(str(root), str(tmp_path / "shown.png"), minutes=0))["faults"]
    assert np.sum(recorded.episode == 0) >= 25
    assert np.sum(recorded.episode == 1) >= 15


ALONE = """
images: {observation.images.front: {topic: front/image_raw}}
joint_states: {topic: joint_states}
state: {observation.state: [joint_positions]}
arm: {joints: [joint1, joint2, joint3, joint4, joint5, joint6, joint7]}
action: {kind: joint_position, dt: 0.1}
limits:
  position: {low: [-3, -3, -3, -3, -3, -3, -3], high: [4, 4, 4, 4, 4, 4, 4]}
  velocity: [1, 1, 1, 1, 1, 1, 1]
  step: [1, 1, 1, 1, 1, 1, 1]
interfaces: {forward_position: {topic: commands}}
commands: {topic: joint_states}
"""


@pytest.fixture
def led(graph: Any, tmp_path: Path) -> Any:
    """The simulated robot without a policy: its own joint states count as its commands."""
    (tmp_path / "robot.yaml").write_text(ALONE)
    graph.start("s")
    return graph


def test_a_recorder_that_is_killed_keeps_earlier_episodes(led: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    robot = f"robot_config:={tmp_path / 'robot.yaml'}"
    recording = Recording(led, root, robot)
    words = ["-p", robot, "-p", f"root:={root}", "-p", "autostart:=true"]
    second = led.start("r2", "-r", "__node:=second", *words)
    assert second.wait(90) == 1
    assert "configure failed: --root is" in led.output("r2")
    recording.start()
    led.spin(2.0)
    recording.stop()
    stored = len(open_dataset(root))
    recording.start()
    led.spin(1.0)
    led.stop("r", signal.SIGKILL)
    assert len(open_dataset(root)) == stored > 0
    again = Recording(led, root, robot, "resume:=true")
    assert again.state == "idle: 1 episode stored"
    again.start()
    led.spin(1.0)
    led.stop("s", signal.SIGKILL)
    assert "sent nothing for" in again.wait("ended")
    again.stop()
    assert len(open_dataset(root)) > stored
