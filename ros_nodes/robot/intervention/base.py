"""The base class of devices with which a person takes over, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ceed_vla.errors import ConfigError, ObservationError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.ros_types import message_class
from ceed_vla.ros_nodes.robot.yaml_fields import Fields

DEVICES: dict[str, type[Device]] = {}


@dataclass(frozen=True)
class Wish:
    """What a person wants of the arm now.

    Attributes:
        active: Whether the device is moved more than its threshold.
        twist: Velocity of the TCP (6,) in the base frame: [m/s], [rad/s]; None if joints are given.
        joints: Positions (J,) [rad]; None if a twist is given.
        opening: Of the gripper [m]; None to leave it as it is.
        button: Whether the button that takes over is pressed; None if this message does not say.
    """

    active: bool
    twist: Array | None = None
    joints: Array | None = None
    opening: float | None = None
    button: bool | None = None


@dataclass(frozen=True)
class Body:
    """What a device needs to know of the robot.

    Attributes:
        joints: Names of the arm's joints (J,).
        closed, open: Openings of the gripper [m]; None without a gripper.
        fingers_to_opening: Maps the sum of the gripper's joints to the opening [m].
    """

    joints: tuple[str, ...]
    closed: float | None = None
    open: float | None = None
    fingers_to_opening: Callable[[float], float] = float


class Device(ABC):
    """Reads the messages of one kind of device.

    `settings` are the entries below ``intervention`` in the robot's file; a key that no device
    reads is refused.

    Attributes:
        topic: Of the messages.
        moves_tcp: Whether it gives twists, which need a model of the arm.
    """

    message_type: ClassVar[Any]  # class, or name such as "sensor_msgs/msg/Joy"
    moves_tcp: ClassVar[bool] = True

    def __init__(self, settings: Fields, body: Body) -> None:
        self.topic = settings.topic("topic")
        self._body = body

    @property
    def message_class(self) -> Any:
        """The class of the messages."""
        return message_class(self.message_type)

    @abstractmethod
    def read(self, message: Any, now: float) -> Wish:
        """Return what a message wants, which arrived at steady time `now` [s].

        `ObservationError`: The message is malformed, or has a value that is not finite.
        """


def register_device(name: str) -> Callable[[type[Device]], type[Device]]:
    """Class decorator that registers a class under `name`, for ``intervention.kind``.

    `ConfigError`: The name is taken.
    """

    def register(kind: type[Device]) -> type[Device]:
        if name in DEVICES:
            raise ConfigError(f"The device {name!r} exists already; choose another name.")
        DEVICES[name] = kind
        return kind

    return register


def finite(values: Sequence[float], what: str) -> Array:
    """The values as an array; `ObservationError` if one is not finite."""
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ObservationError(f"The {what} are {found.tolist()}; they must be finite.")
    return found
