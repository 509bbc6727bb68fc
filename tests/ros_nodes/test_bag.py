"""Bags contain the sent messages and open in other readers; other DDS implementations exchange
messages with the simulated robot.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")
pytest.importorskip("mcap", reason="mcap is not installed (extra ros2)")

from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String

from ceed_vla.errors import ConfigError
from ceed_vla.ros_nodes.demo.bag import BagWriter, message_definition, read_messages, record
from ceed_vla.ros_nodes.robot.messages import COMMAND, LATCHED, SENSOR


class CountingBag(BagWriter):
    """Counts the messages that it writes: topic -> messages."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.counts: Counter[str] = Counter()

    def write(self, topic: str, *message: Any) -> None:
        super().write(topic, *message)
        self.counts[topic] += 1


def test_definitions_contain_all_the_types_they_use() -> None:
    text = message_definition("trajectory_msgs/msg/JointTrajectory")
    parts = text.split("=" * 80)
    assert "JointTrajectoryPoint[] points" in parts[0]
    names = [part.split()[1] for part in parts[1:]]
    assert sorted(names) == sorted(
        [
            "std_msgs/Header",
            "trajectory_msgs/JointTrajectoryPoint",
            "builtin_interfaces/Time",
            "builtin_interfaces/Duration",
        ]
    )


@pytest.mark.parametrize("wrong", ["Image", "sensor_msgs/Image", "sensor_msgs/srv/Image"])
def test_refuses_names_that_are_no_message_types(wrong: str) -> None:
    with pytest.raises(ConfigError, match="package/msg/Name"):
        message_definition(wrong)


def test_says_which_definition_is_missing() -> None:
    with pytest.raises(ConfigError, match="no_such_msgs"):
        message_definition("no_such_msgs/msg/Thing")
    with pytest.raises(ConfigError, match=r"sensor_msgs/msg/Thing\.msg"):
        message_definition("sensor_msgs/msg/Thing")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bag.mcap"
    with closing(CountingBag(path)) as bag:
        for index in range(5):
            data = serialize_message(Float64MultiArray(data=[float(index), 0.5]))
            bag.write(
                "/numbers", "std_msgs/msg/Float64MultiArray", data, 10 * index, 10 * index + 3
            )
        bag.write("/text", "std_msgs/msg/String", serialize_message(String(data="hello")), 7, 8)
    assert bag.counts == {"/numbers": 5, "/text": 1}
    found = list(read_messages(path, ["/numbers"]))
    assert [(topic, sent, list(message.data)) for topic, sent, message in found] == [
        ("/numbers", 10 * index, [float(index), 0.5]) for index in range(5)
    ]
    bag.close()  # a second call has no effect


def test_rosbags_reads_what_the_simulated_robot_sent(graph: Any, tmp_path: Path) -> None:
    rosbags = pytest.importorskip("rosbags.highlevel", reason="rosbags is not installed")
    heard = graph.listen("/joint_states", JointState)
    graph.start("sim_node", "-p", "seed:=2")
    graph.wait(lambda: heard, "joint states")
    path = tmp_path / "bag.mcap"
    with closing(CountingBag(path)) as bag:
        for topic, kind, qos in (
            ("/joint_states", JointState, COMMAND),
            ("/front/image_raw", Image, SENSOR),
            ("/policy/instruction", String, LATCHED),
        ):
            record(graph.node, bag, topic, kind, qos)
        graph.wait(lambda: bag.counts.get("/joint_states", 0) >= 100, "a hundred joint states")
        counts = dict(bag.counts)
    assert set(counts) == {"/joint_states", "/front/image_raw", "/policy/instruction"}

    with rosbags.AnyReader([path]) as reader:
        types = {connection.topic: connection.msgtype for connection in reader.connections}
        messages: dict[str, list[Any]] = {topic: [] for topic in counts}
        sent: list[int] = []
        for connection, stamp, raw in reader.messages():
            messages[connection.topic].append(reader.deserialize(raw, connection.msgtype))
            sent.append(stamp)
    assert types["/front/image_raw"] == "sensor_msgs/msg/Image"
    assert {topic: len(found) for topic, found in messages.items()} == counts
    image = messages["/front/image_raw"][0]
    assert (image.encoding, image.height, image.width) == ("rgb8", 96, 96)
    assert np.asarray(image.data).reshape(96, 96, 3).std() > 10.0
    assert messages["/policy/instruction"][0].data
    published = [stamp for _, stamp, _ in read_messages(path, ["/joint_states"])]
    periods = np.diff(published) * 1e-9
    assert np.median(periods) == pytest.approx(0.01, abs=0.002)
    assert abs(published[-1] * 1e-9 - time.time()) < 60.0


def test_a_client_without_ros_sees_the_topics_and_drives_the_arm(graph: Any) -> None:
    rosless = pytest.importorskip("rosless", reason="rosless is not installed")
    heard = graph.listen("/joint_states", JointState)
    graph.start("sim_node", "-p", "seed:=2")
    graph.wait(lambda: heard, "joint states")

    peer = rosless.Node(graph.domain)
    states = peer.subscribe("/joint_states", "sensor_msgs/msg/JointState", reliability="reliable")
    front = peer.subscribe("/front/image_raw", "sensor_msgs/msg/Image")
    arm = peer.advertise("/forward_position_controller/commands", "std_msgs/msg/Float64MultiArray")
    state, image = states.read(timeout=10.0), front.read(timeout=10.0)
    assert list(state.name)[:7] == [f"joint{index}" for index in range(1, 8)]
    assert image.encoding == "rgb8"
    assert len(image.data) == 96 * 96 * 3
    assert "/wrist/image_raw" in {topic.name for topic in peer.graph().topics}

    goal = [value + 0.1 for value in list(state.position)[:7]]
    layout = {"dim": [], "data_offset": 0}
    end = time.monotonic() + 20.0
    while time.monotonic() < end:
        arm.send({"layout": layout, "data": goal})
        graph.spin(0.01)
        if np.abs(np.array(heard[-1].position[:7]) - goal).max() < 5e-3:
            break
    np.testing.assert_allclose(heard[-1].position[:7], goal, atol=5e-3)
