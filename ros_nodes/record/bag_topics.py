"""Reads the messages of a robot's topics from a bag (MCAP or sqlite3), without ROS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ceed_vla.errors import ConfigError, DatasetError, raised_as
from ceed_vla.extras import remedy
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig
from ceed_vla.texts import short

EVENTS = "record/episode"  # topic of the record node
INSTRUCTIONS = "policy/instruction"
IMAGE, JOINTS, COMMANDS, EVENT, INSTRUCTION = (
    "image",
    "joints",
    "commands",
    "event",
    "instruction",
)
_SUFFIXES = (".mcap", ".db3")


@dataclass(frozen=True)
class BagMessage:
    """A message of interest.

    Attributes:
        kind: What it is: `IMAGE`, `JOINTS`, `COMMANDS`, `EVENT` or `INSTRUCTION`.
        feature: Of an image; the prefix of joint states.
        arrived: When the bag's recorder received it [s].
        data: Serialized, for an image; otherwise the message.
    """

    kind: str
    feature: str
    arrived: float
    data: Any


def topics_of(robot: RobotConfig, namespace: str) -> dict[str, list[tuple[str, str]]]:
    """Full name of a topic -> kind and feature (`BagMessage`) of everything that reads it, for a
    robot in a namespace. One camera may show two features, and joint states may be the commands.
    """
    uses = [(image.topic, IMAGE, image.feature) for image in robot.images]
    uses += [(topic, JOINTS, prefix) for topic, prefix in robot.joint_topics.items()]
    uses += [(robot.commands.topic, COMMANDS, ""), (EVENTS, EVENT, "")]
    uses += [(INSTRUCTIONS, INSTRUCTION, "")]
    prefix = f"/{namespace.strip('/')}/" if namespace.strip("/") else "/"
    wanted: dict[str, list[tuple[str, str]]] = {}
    for name, kind, feature in uses:
        full = name if name.startswith("/") else prefix + name
        wanted.setdefault(full, []).append((kind, feature))
    return wanted


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a bag: its folder, or its file.

    `ConfigError`: The library is missing, or there is no bag. `DatasetError`: It cannot be read.
    """
    with raised_as(ConfigError, "bags cannot be read", remedy("bags")):
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore
    if not path.exists():
        raise ConfigError(f"There is no bag {path}; give the folder or the file of one.")
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path} is not a bag; its name must end in {' or '.join(_SUFFIXES)}.")
    with _damage(path):
        reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
        reader.open()
    try:
        yield reader
    finally:
        reader.close()


def messages(
    reader: Any, path: Path, wanted: Mapping[str, Sequence[tuple[str, str]]]
) -> Iterator[BagMessage]:
    """Yield the messages of the wanted topics, once for each use, in the order of their arrival.

    `DatasetError`: The bag ends in the middle, or a message does not have its type.
    """
    connections = [one for one in reader.connections if one.topic in wanted]
    if not connections:  # for which the library reads all
        return
    found = iter(reader.messages(connections=connections))
    while True:
        with _damage(path):
            item = next(found, None)
        if item is None:
            return
        connection, nanoseconds, data = item
        for kind, feature in wanted[connection.topic]:
            with _damage(path):
                message = (
                    bytes(data) if kind == IMAGE else reader.deserialize(data, connection.msgtype)
                )
            yield BagMessage(kind, feature, 1e-9 * nanoseconds, message)


def check_topics(
    reader: Any, path: Path, robot: RobotConfig, wanted: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Raise `DatasetError` if the bag lacks a topic of the robot, or has another type there."""
    types = {one.topic: one.msgtype for one in reader.connections}
    compressed = {image.feature for image in robot.images if image.transport == "compressed"}
    uses = [(topic, *use) for topic, found in wanted.items() for use in found]
    for topic, kind, feature in uses:
        if kind in (EVENT, INSTRUCTION):
            expected = "std_msgs/msg/String"
            if topic not in types:
                continue
        elif kind == IMAGE:
            expected = f"sensor_msgs/msg/{'CompressedImage' if feature in compressed else 'Image'}"
        elif kind == COMMANDS and robot.commands.by_arrival:
            expected = "std_msgs/msg/Float64MultiArray"
        else:
            expected = "sensor_msgs/msg/JointState"
        if topic not in types:
            raise DatasetError(
                f"{path} has no topic {topic}, which {robot.source} names; it has "
                f"{short(', '.join(sorted(types))) or 'none'}. Use namespace or topics."
            )
        if types[topic] != expected:
            raise DatasetError(
                f"{path}: {topic} has messages of {types[topic]}; {robot.source} expects "
                f"{expected}."
            )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Name the bag in errors of the library, which raises many types."""
    try:
        yield
    except Exception as error:
        raise DatasetError(
            f"{path} cannot be read, it is damaged or no ROS 2 bag: {short(error)}"
        ) from error
