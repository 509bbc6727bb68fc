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
    """A camera.

    Attributes:
        feature: LeRobot feature, "observation.images.front".
        topic: Where its images come from.
        transport: "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage).
        resize: Scale images to the policy's size; otherwise another size is a fault.
    """

    feature: str
    topic: str
    transport: str
    resize: bool

    @property
    def name(self) -> str:
        """Short name, in diagnostics and holds: "front"."""
        return self.feature.rpartition(".")[2]


@dataclass(frozen=True)
class Arm:
    """The arm's model.

    Attributes:
        model: MJCF or URDF file; None if nothing needs kinematics.
        tcp: Site or body of the tool centre point; "" without a model.
        joints: Arm joints, in the order of states, actions and commands.
        home: Posture that inverse kinematics is pulled to [rad]; empty for the model's own.
        unit: Unit of the policy's joint positions and velocities: "rad" or "deg".
    """

    model: Path | None
    tcp: str
    joints: tuple[str, ...]
    home: tuple[float, ...]
    unit: str

    @property
    def radians(self) -> float:
        """Radians per unit of the policy."""
        return 1.0 if self.unit == "rad" else math.pi / 180.0


@dataclass(frozen=True)
class Gripper:
    """The gripper beside the arm.

    Attributes:
        joints: Its joints in the joint states; their positions add up to the opening.
        opening_scale: Metres of opening per unit of these joints.
        closed: Opening that closes it [m].
        open: Opening that opens it [m].
        action: What the last action dimension says: "binary" (> 0 opens), "opening" (in metres), "none" (no such one).
        topic: Where [opening] is sent (std_msgs/Float64MultiArray).
    """

    joints: tuple[str, ...]
    opening_scale: float
    closed: float
    open: float
    action: str
    topic: str


@dataclass(frozen=True)
class Action:
    """What a policy's action does to the arm.

    Attributes:
        kind: "ee_delta" (TCP translation and rotation vector in the base frame), "joint_position" or "joint_delta".
        dt: Duration of a step [s].
        pose: How "ee_delta" actions move the commanded TCP pose; None for other kinds.
        max_joint_step: "ee_delta": largest change of a joint in one step [rad].
    """

    kind: str
    dt: float
    pose: PoseLimits | None = None
    max_joint_step: float = 0.6


@dataclass(frozen=True)
class Limits:
    """What the arm may do; every tuple has a value for each arm joint.

    Attributes:
        low: Lowest positions [rad]; empty for the model's.
        high: Highest positions [rad]; empty for the model's.
        velocity: Largest velocities [rad/s].
        step: Largest distances of a command from the measured position [rad].
        physical_velocity: Velocities that the joints reach physically [rad/s], to tell joint states that cannot be
            true; empty for the model's.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    velocity: tuple[float, ...]
    step: tuple[float, ...]
    physical_velocity: tuple[float, ...] = ()


@dataclass(frozen=True)
class RobotConfig:
    """A robot as a policy sees it.

    Attributes:
        source: The file.
        images: Cameras.
        joint_states: Topic of sensor_msgs/JointState.
        states: Feature ("observation.state") -> its components, one after the other, of `COMPONENTS`.
        arm: Arm.
        gripper: Gripper; None without one.
        action: Action.
        limits: Limits.
        interfaces: The interfaces that the robot has, by name.
    """

    source: Path
    images: tuple[ImageSource, ...]
    joint_states: str
    states: dict[str, tuple[str, ...]]
    arm: Arm
    gripper: Gripper | None
    action: Action
    limits: Limits
    interfaces: dict[str, ActionInterface]

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
