"""The base class of action interfaces, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import Array
from ceed_vla.ros_nodes.robot.ros_types import message_class
from ceed_vla.ros_nodes.robot.yaml_fields import Fields

if TYPE_CHECKING:  # a robot that is commanded in joint positions needs no model
    from builtin_interfaces.msg import Time

    from ceed_vla.ros_nodes.robot.kinematics import ModelArm

INTERFACES: dict[str, type[ActionInterface]] = {}


@dataclass(frozen=True)
class CommandedArm:
    """Properties of the arm that an interface may need."""

    joints: tuple[str, ...]  # J names, in the order of every array
    period: float  # between commands [s]
    low: Array  # (J,) positions [rad]
    high: Array
    step: Array  # `limits.step`: distance of every commanded point from the measured position [rad]
    model: ModelArm | None  # None without arm.model in the robot's file


@dataclass(frozen=True)
class Command:
    positions: Array  # (J,) [rad]
    velocities: Array  # (J,) from the last command to this one; zero on a hold [rad/s]
    measured: Array  # (J,) the last trusted pose [rad]
    stamp: Time  # now


class ActionInterface(ABC):
    """Sends commands to the arm: settings, message and topic of one kind of controller.

    `settings` are the entries below ``interfaces.<name>`` in the robot's file; a key that no
    interface reads is refused.
    """

    message_type: ClassVar[Any]  # class, or name such as "std_msgs/msg/Float64MultiArray"
    needs_model: ClassVar[bool] = False  # whether it requires `CommandedArm.model`
    # False if only the TCP is commanded: the arm's posture may then differ
    commands_joints: ClassVar[bool] = True

    def __init__(self, settings: Fields) -> None:
        self.topics = settings.topics("topic")  # by group of joints; "" without groups
        self.topic = next(iter(self.topics.values()), "")

    @property
    def message_class(self) -> Any:
        """The class of the messages."""
        return message_class(self.message_type)

    @abstractmethod
    def message(self, command: Command, arm: CommandedArm) -> Any:
        """Return the message for `command`."""


def register_interface(name: str) -> Callable[[type[ActionInterface]], type[ActionInterface]]:
    """Class decorator that registers a class under `name`, for robots' files and the parameter
    ``action_interface``.

    `ConfigError`: The name is taken.
    """

    def register(kind: type[ActionInterface]) -> type[ActionInterface]:
        if name in INTERFACES:
            raise ConfigError(f"The action interface {name!r} exists already; choose another name.")
        INTERFACES[name] = kind
        return kind

    return register
