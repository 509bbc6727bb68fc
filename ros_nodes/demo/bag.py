"""Records topics as an MCAP bag for Foxglove and rosbags: unchanged messages and definitions."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceed_vla.errors import ConfigError
from ceed_vla.outputs import MADE_BY

if TYPE_CHECKING:
    from rclpy.node import Node

# a field of a message type
_FIELD = re.compile(r"^([a-z]\w*/)?(?:msg/)?([A-Z]\w*)(?:<=\d+)?(?:\[.*?\])?\s")


class BagWriter:
    """An MCAP file of serialized ROS 2 messages; creates its folder and replaces an older file."""

    def __init__(self, path: str | Path) -> None:
        from mcap.writer import Writer

        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._channels: dict[str, int] = {}
        self._file = self.path.open("wb")
        self._writer = Writer(self._file)
        self._writer.start(profile="ros2", library=MADE_BY)
        self._schema = cache(self._writer.register_schema)  # one per message type

    def write(self, topic: str, kind: str, data: bytes, published: int, received: int) -> None:
        """Append a serialized message (CDR with its header).

        Args:
            topic: Name of the topic.
            kind: Type of the message, such as "sensor_msgs/msg/Image".
            data: The message.
            published: Time of sending [ns] since 1970.
            received: Time of arrival [ns] since 1970.
        """
        if topic not in self._channels:
            schema = self._schema(kind, "ros2msg", message_definition(kind).encode())
            self._channels[topic] = self._writer.register_channel(topic, "cdr", schema)
        self._writer.add_message(self._channels[topic], received, data, published)

    def close(self) -> None:
        """Write the index; without it, a bag must be repaired before it can be read.

        May be called twice.
        """
        if not self._file.closed:
            self._writer.finish()
            self._file.close()


def record(node: Node, bag: BagWriter, topic: str, message_type: Any, qos: Any) -> Any:
    """Record all messages of a topic that `qos` buffers, while the caller spins the node.

    The sender's middleware records the time of sending, so a slow recorder does not change it.
    Returns the subscription.
    """
    name = node.resolve_topic_name(topic)
    kind = type_name(message_type)

    def write(data: bytes, info: dict[str, int]) -> None:
        now = time.time_ns()
        bag.write(name, kind, data, info.get("source_timestamp") or now, now)

    callback: Callable[..., None] = write
    return node.create_subscription(message_type, topic, callback, qos, raw=True)


def read_messages(path: str | Path, topics: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
    """Iterate over the messages on `topics` in order of arrival: topic, time of sending [ns],
    message.
    """
    from mcap.reader import make_reader
    from mcap_ros2.decoder import DecoderFactory

    with Path(path).open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        for found in reader.iter_decoded_messages(topics=list(topics)):
            yield found.channel.topic, found.message.publish_time, found.decoded_message


def type_name(message_type: Any) -> str:
    """Return the name of a message class, such as "sensor_msgs/msg/Image"."""
    package, kind, *_ = message_type.__module__.split(".")
    return f"{package}/{kind}/{message_type.__name__}"


def message_definition(kind: str) -> str:
    """Return the definition of a message type, "package/msg/Name", and of all types it contains, in
    the form that bags store.

    `ConfigError`: The name has another form, or the type's ``.msg`` file is not installed.
    """
    parts = kind.split("/")
    if len(parts) != 3 or parts[1] != "msg":
        raise ConfigError(f"{kind!r} is not a message type; write package/msg/Name.")
    texts: dict[str, str] = {}
    waiting = [(parts[0], parts[2])]
    while waiting:
        package, name = waiting.pop(0)
        if f"{package}/{name}" in texts:
            continue
        text = _definition_file(package, name).read_text(encoding="utf-8")
        texts[f"{package}/{name}"] = text
        for line in text.splitlines():
            field = _FIELD.match(line.strip())
            if field:
                waiting.append(((field[1] or package).rstrip("/"), field[2]))
    (_, own), *others = texts.items()
    return "\n".join([own, *(f"{'=' * 80}\nMSG: {name}\n{text}" for name, text in others)])


def _definition_file(package: str, name: str) -> Path:
    """Return ``share/<package>/msg/<name>.msg`` in the installation that has the package."""
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"The message package {package} is not installed ({error}).") from error
    ament = [
        Path(prefix)
        for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
        if prefix
    ]
    for prefix in [*ament, *Path(str(module.__file__)).parents]:
        path = prefix / "share" / package / "msg" / f"{name}.msg"
        if path.is_file():
            return path
    raise ConfigError(f"The definition {package}/msg/{name}.msg is not installed with the package.")
