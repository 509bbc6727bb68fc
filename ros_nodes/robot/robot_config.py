"""What a policy must know of a robot: its topics as LeRobot features, its actions as commands. See `robot_file`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ceed_vla.errors import ConfigError
from ceed_vla.kinematics import PoseLimits
from ros_nodes.robot.interfaces.base import ActionInterface

ACTION_KINDS = ("ee_delta", "joint_position", "joint_delta")
GRIPPER_ACTIONS = ("binary", "opening", "none")
TRANSPORTS = ("raw", "compressed")
JOINT_UNITS = ("rad", "deg")
POSE_COMPONENTS = ("tcp_position", "tcp_quaternion")
COMMAND_COMPONENTS = ("commanded_position", "commanded_yaw_cos_sin")
# Component of a state -> its length; 0 stands for a value of each arm joint.
COMPONENTS = {
    **{"joint_positions": 0, "joint_velocities": 0, "finger_opening": 1, "commanded_gripper": 1},
    **{"tcp_position": 3, "tcp_quaternion": 4, "commanded_position": 3, "commanded_yaw_cos_sin": 2},
}


@dataclass(frozen=True)
class ImageSource:
    """A camera."""

    feature: str  # of LeRobot, "observation.images.front"
    topic: str
    transport: str  # "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage)
    resize: bool  # scale images to the policy's size; otherwise another size is a fault

    @property
    def name(self) -> str:
        """Short name, in diagnostics and holds: "front"."""
        return self.feature.rpartition(".")[2]


@dataclass(frozen=True)
class Arm:
    """The arm's model."""

    model: Path | None  # MJCF or URDF file; None if nothing needs kinematics
    tcp: str  # site or body of the tool centre point; "" without a model
    joints: tuple[str, ...]  # in the order of states, actions and commands
    home: tuple[float, ...]  # posture that inverse kinematics is pulled to [rad]; empty for the model's own
    unit: str  # of the policy's joint positions and velocities: "rad" or "deg"

    @property
    def radians(self) -> float:
        """Radians per unit of the policy."""
        return 1.0 if self.unit == "rad" else math.pi / 180.0


@dataclass(frozen=True)
class Gripper:
    """The gripper beside the arm."""

    joints: tuple[str, ...]  # of the joint states; their positions add up to the opening
    opening_scale: float  # metres of opening per unit of these joints
    closed: float  # opening [m]
    open: float  # opening [m]
    action: str  # what the last action dimension says: "binary" (> 0 opens), "opening" [m], "none" (no such one)
    topic: str  # where [opening] is sent (std_msgs/Float64MultiArray)


@dataclass(frozen=True)
class Action:
    """What a policy's action does to the arm."""

    kind: str  # "ee_delta" (TCP translation and rotation vector in the base frame), "joint_position" or "joint_delta"
    dt: float  # duration of a step [s]
    # Of "ee_delta": how the commanded TCP pose moves, and the largest change of a joint in one step [rad].
    pose: PoseLimits | None = None
    max_joint_step: float = 0.6


@dataclass(frozen=True)
class Limits:
    """What the arm may do; every tuple has a value for each arm joint."""

    low: tuple[float, ...]  # positions [rad]; empty for the model's
    high: tuple[float, ...]
    velocity: tuple[float, ...]  # [rad/s]
    step: tuple[float, ...]  # largest distances of a command from the measured position [rad]
    # What the joints reach [rad/s], to tell joint states that cannot be true; empty for the model's.
    physical_velocity: tuple[float, ...] = ()


@dataclass(frozen=True)
class RobotConfig:
    """A robot as a policy sees it."""

    source: Path
    images: tuple[ImageSource, ...]
    joint_states: str  # topic of sensor_msgs/JointState
    states: dict[str, tuple[str, ...]]  # feature ("observation.state") -> its `COMPONENTS`, one after the other
    arm: Arm
    gripper: Gripper | None
    action: Action
    limits: Limits
    interfaces: dict[str, ActionInterface]  # by name

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        body = 6 if self.action.kind == "ee_delta" else len(self.arm.joints)
        return body + int(self.gripper is not None and self.gripper.action != "none")

    def state_dim(self, feature: str) -> int:
        """Length of a state feature."""
        return sum(COMPONENTS[component] or len(self.arm.joints) for component in self.states[feature])

    def interface(self, name: str) -> ActionInterface:
        """An interface of the robot.

        Raises:
            ConfigError: The robot has no such one, or one that needs a model of the arm without it.
        """
        if name not in self.interfaces:
            raise ConfigError(f"{self.source} has no interface {name!r}; it has {', '.join(self.interfaces)}.")
        if self.interfaces[name].needs_model and self.arm.model is None:
            raise ConfigError(f"{self.source}: {name} needs arm.model and arm.tcp.")
        return self.interfaces[name]
