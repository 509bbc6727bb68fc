"""A robot as its file describes it: topics, joints, units, limits and interfaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import PoseLimits
from ceed_vla.ros_nodes.robot.interfaces.base import ActionInterface
from ceed_vla.ros_nodes.robot.intervention.base import Device
from ceed_vla.ros_nodes.robot.intervention.patience import Patience

POSE_COMPONENTS = ("tcp_position", "tcp_quaternion")
COMMAND_COMPONENTS = ("commanded_position", "commanded_yaw_cos_sin")
# Component of a state -> its length; 0: one value per arm joint.
COMPONENTS = {
    **{
        "joint_positions": 0,
        "joint_velocities": 0,
        "joint_efforts": 0,
        "finger_opening": 1,
        "commanded_gripper": 1,
    },
    **{"tcp_position": 3, "tcp_quaternion": 4, "commanded_position": 3, "commanded_yaw_cos_sin": 2},
}


@dataclass(frozen=True)
class ImageSource:
    """A camera."""

    feature: str  # LeRobot's name, such as "observation.images.front"
    topic: str
    transport: str  # "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage)
    resize: bool  # scale images to the policy's size; otherwise another size is a fault
    # top, left, height, width [px] of the part that is cut out before resizing; empty for all
    crop: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Short name in diagnostics and holds, such as "front"."""
        return self.feature.rpartition(".")[2]


@dataclass(frozen=True)
class Linear:
    """Linear mapping between a foreign unit and ours, ours = scale * theirs + offset; numbers or
    arrays of joints.
    """

    scale: Any = 1.0
    offset: Any = 0.0

    def ours(self, theirs: Any) -> Any:
        return self.scale * theirs + self.offset

    def theirs(self, ours: Any) -> Any:
        return (ours - self.offset) / self.scale


@dataclass(frozen=True)
class Group:
    """One of several arms that a policy drives together.

    Its joints are named ``GROUP_JOINT`` here, because arms of one type name their joints alike.
    """

    name: str
    joints: tuple[str, ...]  # as its messages name them
    joint_states: str  # topic of sensor_msgs/JointState

    @property
    def prefix(self) -> str:
        """What precedes the names of its messages here."""
        return f"{self.name}_"


@dataclass(frozen=True)
class Arm:
    """The arm's model."""

    model: Path | None  # MJCF or URDF file; None if nothing needs kinematics
    tcp: str  # site or body of the tool centre point; "" without a model
    joints: tuple[str, ...]  # in the order of states, actions and commands
    # posture for inverse kinematics and ~/go_home [rad]; empty for the model's own
    home: tuple[float, ...]
    unit: str  # of the policy's joint positions and velocities: "rad" or "deg"
    # Per joint, instead of `unit`: radians = sign * scale * policy's value + offset; empty: 1 and
    # 0.
    sign: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()  # [rad]
    groups: tuple[Group, ...] = ()  # empty for one arm

    @property
    def parts(self) -> dict[str, slice]:
        """Group -> its place among the joints; one part "" for one arm."""
        if not self.groups:
            return {"": slice(0, len(self.joints))}
        found = {}
        begin = 0
        for group in self.groups:
            found[group.name] = slice(begin, begin + len(group.joints))
            begin += len(group.joints)
        return found

    @property
    def units(self) -> Linear:
        """Mapping from the policy's joint positions (J,) to radians."""
        unit = 1.0 if self.unit == "rad" else math.pi / 180.0
        scale = np.array(self.scale or (unit,) * len(self.joints)) * np.array(self.sign or 1.0)
        return Linear(scale, np.array(self.offset or 0.0))


@dataclass(frozen=True)
class Gripper:
    """The gripper. Joints, policies and drivers each have their own unit; all are mapped to the
    opening [m].
    """

    joints: tuple[str, ...]  # in the joint states
    measured: Linear  # from the sum of these joints to the opening [m]
    closed: float  # opening [m]
    open: float  # opening [m]
    # meaning of the last action dimension: "binary" (> 0 opens), "opening" [m], "none" (absent)
    action: str
    topic: str  # of the command (std_msgs/Float64MultiArray)
    command: str = "opening"  # [opening in metres], or "joint": the target of each of `joints`
    # from the value of action "opening", and of states, to the opening [m]
    policy: Linear = Linear()

    def told(self, opening: float) -> float:
        """Return the driver's command for an opening [m]."""
        joints: float = self.measured.theirs(opening) / max(len(self.joints), 1)
        return opening if self.command == "opening" else joints


@dataclass(frozen=True)
class Action:
    """The effect of a policy's action on the arm."""

    # "ee_delta" (TCP translation and rotation vector in the base frame), "joint_position" or
    # "joint_delta"
    kind: str
    dt: float  # duration of a step [s]
    # For "ee_delta": motion of the commanded TCP pose, and the largest change of a joint in one
    # step [rad].
    pose: PoseLimits | None = None
    max_joint_step: float = 0.6


@dataclass(frozen=True)
class Limits:
    """Limits of the arm; every tuple has one value per arm joint."""

    low: tuple[float, ...]  # positions [rad]; empty for the model's
    high: tuple[float, ...]
    velocity: tuple[float, ...]  # [rad/s]
    step: tuple[float, ...]  # largest distances of a command from the measured position [rad]
    # Largest physical velocities [rad/s], to detect impossible joint states; empty for the model's.
    physical_velocity: tuple[float, ...] = ()
    acceleration: tuple[float, ...] = ()  # of commands [rad/s^2]; empty for none


@dataclass(frozen=True)
class CommandSource:
    """Where recordings read what the arm is commanded."""

    topic: str = "policy/commanded"
    # "joint_state" (sensor_msgs/JointState), or "positions" (std_msgs/Float64MultiArray)
    kind: str = "joint_state"
    joints: tuple[str, ...] = ()  # names in these messages, in the order of the arm's joints
    # names whose positions are the gripper's, as `Gripper.joints`; empty: "gripper" is the opening
    gripper: tuple[str, ...] = ()

    @property
    def by_arrival(self) -> bool:
        """Whether the messages have no stamp, so that the time of their arrival counts."""
        return self.kind == "positions"


@dataclass(frozen=True)
class Intervention:
    """How a person takes over from the policy."""

    device: Device
    patience: Patience
    # topic of std_msgs/Bool: whether the button that takes over is pressed; "" without one
    button_topic: str = ""


@dataclass(frozen=True)
class RobotConfig:
    """A robot's file: the topics and limits that a policy needs."""

    source: Path
    images: tuple[ImageSource, ...]
    joint_states: str  # topic of sensor_msgs/JointState
    # feature ("observation.state") -> its `COMPONENTS`, in order
    states: dict[str, tuple[str, ...]]
    arm: Arm
    gripper: Gripper | None
    action: Action
    limits: Limits
    interfaces: dict[str, ActionInterface]  # by name
    allow: tuple[str, ...] = ()  # of `ALLOWABLE`
    commands: CommandSource = CommandSource()
    intervention: Intervention | None = None

    @property
    def joint_topics(self) -> dict[str, str]:
        """Topic of joint states -> what precedes the names of its joints here."""
        if self.arm.groups:
            return {group.joint_states: group.prefix for group in self.arm.groups}
        return {self.joint_states: ""}

    @property
    def action_dim(self) -> int:
        body = 6 if self.action.kind == "ee_delta" else len(self.arm.joints)
        return body + int(self.gripper is not None and self.gripper.action != "none")

    def state_dim(self, feature: str) -> int:
        return sum(self.component_dim(component) for component in self.states[feature])

    def component_dim(self, component: str) -> int:
        """Length of one of `COMPONENTS`."""
        return COMPONENTS[component] or len(self.arm.joints)

    def interface(self, name: str) -> ActionInterface:
        """Return an interface of the robot.

        `ConfigError`: The robot does not have it, or it needs a model of the arm and there is none.
        """
        if name not in self.interfaces:
            raise ConfigError(
                f"{self.source} has no interface {name!r}; it has {', '.join(self.interfaces)}."
            )
        if self.interfaces[name].needs_model and self.arm.model is None:
            raise ConfigError(f"{self.source}: {name} needs arm.model and arm.tcp.")
        return self.interfaces[name]
