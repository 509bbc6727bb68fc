"""Data sets from bags: both storage formats, bags without events, and bags that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from ceed_vla.data.frames import open_dataset
from ceed_vla.errors import CeedVLAError, ConfigError, DatasetError
from ceed_vla.ros_nodes.record.bag_to_dataset import BagConfig, bag_to_dataset

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types
TIME, HEADER = TYPES["builtin_interfaces/msg/Time"], TYPES["std_msgs/msg/Header"]
IMAGE, JOINTS, TEXT = "sensor_msgs/msg/Image", "sensor_msgs/msg/JointState", "std_msgs/msg/String"
ROBOT = """
images: {observation.images.front: {topic: front}}
joint_states: {topic: joint_states}
state: {observation.state: [joint_positions]}
arm: {joints: [a, b]}
action: {kind: joint_position, dt: 0.1}
limits: {position: {low: [-3, -3], high: [3, 3]}, velocity: [1, 1], step: [1, 1]}
interfaces: {forward_position: {topic: commands}}
commands: {topic: leader/joint_states, joints: [leader_a, leader_b]}
"""
BEGIN = 1000.0


def header(stamp: float) -> Any:
    whole = int(stamp)
    return HEADER(stamp=TIME(sec=whole, nanosec=round(1e9 * (stamp - whole))), frame_id="")


def image(stamp: float) -> Any:
    pixels = np.zeros((16, 20, 3), np.uint8)
    pixels[:, : int(10 * (stamp - BEGIN)) % 20] = 200
    return TYPES[IMAGE](header(stamp), 16, 20, "rgb8", 0, 60, pixels.reshape(-1))


def joints(stamp: float, names: list[str]) -> Any:
    none = np.zeros(0)
    return TYPES[JOINTS](header(stamp), names, np.array([stamp, -stamp]) - BEGIN, none, none)


Message = tuple[float, str, str, Any]  # time of arrival, topic, type, message


def robot_run(seconds: float) -> list[Message]:
    """What a robot and its leader arm send, in the order of arrival."""
    found: list[Message] = []
    for index in range(round(30 * seconds)):
        stamp = BEGIN + index / 30
        found.append((stamp + 0.02, "/front", IMAGE, image(stamp)))
    for index in range(round(50 * seconds)):
        stamp = BEGIN + index / 50
        found.append((stamp, "/joint_states", JOINTS, joints(stamp, ["a", "b"])))
        leader = joints(stamp + 0.001, ["leader_a", "leader_b"])
        found.append((stamp + 0.001, "/leader/joint_states", JOINTS, leader))
    return sorted(found, key=lambda message: message[0])


def event(stamp: float, **fields: Any) -> Message:
    return stamp, "/record/episode", TEXT, TYPES[TEXT](json.dumps(fields))


def write(path: Path, found: Iterable[Message], plugin: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """Write a bag; return its folder."""
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections: dict[str, Any] = {}
        for arrived, topic, kind, message in sorted(found, key=lambda one: one[0]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            data = STORE.serialize_cdr(message, kind)
            writer.write(connections[topic], round(1e9 * arrived), data)
    return path


@pytest.fixture
def robot(tmp_path: Path) -> str:
    (tmp_path / "robot.yaml").write_text(ROBOT)
    return str(tmp_path / "robot.yaml")


def convert(bag: Path, robot: str, name: str = "data", **settings: Any) -> Any:
    root = bag.parent / name
    return bag_to_dataset(BagConfig(bag, root, robot, **settings))


def test_a_bag_without_events_is_one_episode_in_both_formats(tmp_path: Path, robot: str) -> None:
    for plugin in (StoragePlugin.MCAP, StoragePlugin.SQLITE3):
        bag = write(tmp_path / plugin.name, robot_run(4.0), plugin)
        summary = convert(bag, robot, f"data_{plugin.name}", instruction="wipe the table")
        assert (summary.episodes, summary.frames) == (1, 39)
    one, other = (open_dataset(tmp_path / f"data_{name}") for name in ("MCAP", "SQLITE3"))
    np.testing.assert_array_equal(one.state, other.state)
    camera = "observation.images.front"
    np.testing.assert_array_equal(one.images[camera], other.images[camera])
    assert one.tasks == ["wipe the table"]
    # At 10 Hz from the first message of every input on; the action is where the leader is next.
    assert one.action is not None
    begin = 1 / 30 + 0.5 / 30
    np.testing.assert_allclose(one.state[:, 0], begin + 0.1 * np.arange(39), atol=0.021)
    np.testing.assert_allclose(one.action[:, 0], begin + 0.1 * np.arange(1, 40), atol=0.021)
    file = next((tmp_path / "MCAP").glob("*.mcap"))
    assert convert(file, robot, "../of_file", instruction="wipe the table").frames == 39


def test_events_of_the_record_node_say_what_is_an_episode(
    tmp_path: Path, robot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = robot_run(8.0)
    found += [
        event(1000.52, event="start", time=1000.52, instruction="one"),
        event(1002.0, event="stop", time=1002.0, success=True),
        event(1003.0, event="start", time=1003.0, instruction="two"),
        event(1004.0, event="discard"),
        event(1005.0, event="start", time=1005.0, instruction="three"),
        event(1006.0, event="stop", time=1006.0, success=False),
        event(1007.0, event="start", time=1007.0, instruction="four"),
    ]
    summary = convert(write(tmp_path / "bag", found), robot)
    assert (summary.episodes, summary.frames) == (2, 14 + 9)
    data = open_dataset(tmp_path / "data")
    assert [data.tasks[i] for i in data.task[[0, 14]]] == ["one", "three"]
    np.testing.assert_allclose(data.state[0, 0], 0.533 + 0.017, atol=0.021)
    shown = capsys.readouterr().out
    for text in ("discarded", "failure", "the bag ends before the episode"):
        assert text in shown


def test_a_topic_may_have_several_uses(tmp_path: Path) -> None:
    """Two views of one camera, and an arm that a person guides by hand."""
    old, new = (
        "images: {observation.images.front: {topic: front}}",
        (
            "images: {observation.images.front: {topic: front, crop: [0, 0, 16, 10]}, "
            "observation.images.side: {topic: front, crop: [0, 10, 16, 10]}}"
        ),
    )
    leader = "commands: {topic: leader/joint_states, joints: [leader_a, leader_b]}"
    assert old in ROBOT
    assert leader in ROBOT
    text = ROBOT.replace(old, new).replace(leader, "commands: {topic: joint_states}")
    (tmp_path / "robot.yaml").write_text(text)
    bag = write(tmp_path / "bag", robot_run(2.0))
    convert(bag, str(tmp_path / "robot.yaml"), instruction="wipe the table")
    data = open_dataset(tmp_path / "data")
    assert sorted(data.images) == ["observation.images.front", "observation.images.side"]
    np.testing.assert_allclose(data.action[:-1, 0], data.state[1:, 0], atol=1e-6)


def test_an_instruction_may_come_after_the_first_frames(tmp_path: Path, robot: str) -> None:
    found = [*robot_run(2.0), (1000.9, "/policy/instruction", TEXT, TYPES[TEXT]("wipe"))]
    summary = convert(write(tmp_path / "bag", found), robot)
    assert summary.episodes == 1
    assert open_dataset(tmp_path / "data").tasks == ["wipe"]


def test_an_instruction_is_of_no_episode_before_it(
    tmp_path: Path, robot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [m for m in robot_run(6.0) if m[1] != "/front" or not 1002.0 < m[0] < 1003.5]
    for time, text in ((1000.5, " "), (1004.5, "wipe")):
        found.append((time, "/policy/instruction", TEXT, TYPES[TEXT](text)))
    bag = write(tmp_path / "bag", found)
    summary = convert(bag, robot)
    assert summary.episodes == 1
    assert 20 <= summary.frames <= 25
    assert "not stored: no" in capsys.readouterr().out
    assert open_dataset(tmp_path / "data").tasks == ["wipe"]
    assert convert(bag, robot, "both", instruction="sweep").episodes == 2  # until the bag's own
    data = open_dataset(tmp_path / "both")
    assert [data.tasks[i] for i in data.task[[0, -1]]] == ["sweep", "wipe"]


def test_an_episode_that_ended_by_itself_has_no_frame_after_it(tmp_path: Path, robot: str) -> None:
    found = robot_run(6.0)
    found += [
        event(1000.52, event="start", time=1000.52, instruction="one"),
        event(1002.0, event="full", time=1002.0),
        event(1005.0, event="stop", time=1002.0, success=True),
    ]
    assert convert(write(tmp_path / "bag", found), robot).frames == 14


def test_a_gap_begins_a_new_episode(tmp_path: Path, robot: str) -> None:
    found = [m for m in robot_run(6.0) if m[1] != "/front" or not 1002.0 < m[0] < 1003.5]
    summary = convert(write(tmp_path / "bag", found), robot, instruction="wipe the table")
    assert summary.episodes == 2
    assert 40 <= summary.frames <= 50


def test_a_clock_in_the_future_ends_no_episode(tmp_path: Path, robot: str) -> None:
    found = robot_run(4.0)
    found.append((1002.0, "/leader/joint_states", JOINTS, joints(1500.0, ["leader_a", "leader_b"])))
    summary = convert(write(tmp_path / "bag", found), robot, instruction="wipe the table")
    assert summary.episodes == 1
    assert summary.frames in (39, 40)  # frames need not wait for the next command


def refused(bag: Path, robot: str, expected: str, **settings: Any) -> None:
    kind: type[CeedVLAError] = DatasetError
    if "instruction" not in settings:
        settings["instruction"] = "wipe the table"
    with pytest.raises((kind, ConfigError), match=expected):
        convert(bag, robot, **settings)
    assert not (bag.parent / "data" / "data").exists()


def test_bags_that_cannot_be_used(tmp_path: Path, robot: str) -> None:
    found = robot_run(3.0)
    whole = write(tmp_path / "bag", found)
    refused(tmp_path / "absent", robot, "There is no bag")
    refused(whole, robot, "The bag has no instruction; give --instruction", instruction="")
    refused(whole, robot, "has no topic /left/", namespace="left")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", robot, "cannot be read, it is damaged or no ROS 2 bag")
    (tmp_path / "words.txt").write_text("no bag")
    refused(tmp_path / "words.txt", robot, "its name must end in .mcap or .db3")
    for name in ("foreign.mcap", "foreign.db3"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 40)
        refused(tmp_path / name, robot, "cannot be read, it is damaged or no ROS 2 bag")
    typed = [(t, "/front" if n == "/joint_states" else n, k, m) for t, n, k, m in found]
    typed = [one for one in typed if one[1] != "/front" or one[2] != IMAGE]
    typed += [(t, "/joint_states", k, m) for t, n, k, m in found if n == "/joint_states"]
    refused(write(tmp_path / "typed", typed), robot, "has messages of sensor_msgs/msg/JointState")
    silent = [one for one in found if one[1] != "/front" or one[0] < 1000.05]
    file = next(whole.glob("*.mcap"))
    data = file.read_bytes()
    for share in (0.3, 0.8, 0.999):
        cut = tmp_path / f"cut{share}.mcap"
        cut.write_bytes(data[: int(share * len(data))])
        refused(cut, robot, "cannot be read, it is damaged or no ROS 2 bag")
    assert convert(write(tmp_path / "short", silent), robot, "s", instruction="x").frames < 10


def test_damage_in_the_middle_keeps_what_was_before(tmp_path: Path, robot: str) -> None:
    found = robot_run(6.0)
    found += [
        event(1000.5, event="start", time=1000.5, instruction="one"),
        event(1002.0, event="stop", time=1002.0, success=True),
        event(1004.0, event="jump"),
        event(1005.0, nothing=1),
    ]
    bag = write(tmp_path / "bag", found)
    with pytest.raises(DatasetError, match=r"is none of the record node.*1 episode of the bag"):
        convert(bag, robot)
    assert len(open_dataset(tmp_path / "data")) == 14


WITHOUT_ROS = """
import sys
for name in ("rclpy", "sensor_msgs", "std_msgs", "builtin_interfaces", "rcl_interfaces"):
    sys.modules[name] = None  # cannot be imported
from ceed_vla.cli.entry import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_bag_is_converted_where_ros_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(ROBOT)
    bag = write(tmp_path / "bag", robot_run(2.0))
    words = ["bag-to-dataset", str(bag), "--robot", str(tmp_path / "robot.yaml")]
    words += ["--root", str(tmp_path / "data"), "--instruction", "lift", "--format", "png"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROS, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(open_dataset(tmp_path / "data")) >= 15
