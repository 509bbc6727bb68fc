"""What a policy must know of a robot: its topics as LeRobot features, its actions as commands. See `robot_file`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ceed_vla.errors import ConfigError

ACTION_KINDS = ("ee_delta", "joint_position", "joint_delta")
GRIPPER_ACTIONS = ("binary", "opening", "none")
TRANSPORTS = ("raw", "compressed")
JOINT_UNITS = ("rad", "deg")
INTERFACES = ("forward_position", "joint_trajectory", "servo_twist")
POSE_COMPONENTS = ("tcp_position", "tcp_quaternion")
COMMAND_COMPONENTS = ("commanded_position", "commanded_yaw_cos_sin")
COMPONENTS = (
    *("joint_positions", "joint_velocities", "finger_opening", "commanded_gripper"),
    *POSE_COMPONENTS,
    *COMMAND_COMPONENTS,
)
_SIZES = {
    **{"finger_opening": 1, "commanded_gripper": 1, "tcp_position": 3, "tcp_quaternion": 4},
    **{"commanded_position": 3, "commanded_yaw_cos_sin": 2},
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
        position_scale: Translation of a full action [m]; 0 unless "ee_delta", like all below.
        rotation_scale: Rotation of a full action [rad].
        workspace_low: Box of the commanded TCP position, xyz [m].
        workspace_high: Its other corner.
        max_tilt: Largest commanded |roll| and |pitch| [rad].
        max_yaw: Largest commanded |yaw| [rad].
        max_joint_step: Largest change of a joint in one step [rad].
    """

    kind: str
    dt: float
    position_scale: float = 0.0
    rotation_scale: float = 0.0
    workspace_low: tuple[float, ...] = ()
    workspace_high: tuple[float, ...] = ()
    max_tilt: float = 0.0
    max_yaw: float = 0.0
    max_joint_step: float = 0.0


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
class Interface:
    """How commands reach the arm.

    Attributes:
        kind: One of `INTERFACES`.
        topic: Where to.
        stop_time: "joint_trajectory": the way-points come to rest in this time after the next command [s].
        frame: "servo_twist": frame of the twist.
        gain: "servo_twist": speed per distance between the commanded and the measured TCP [1/s].
        max_linear: "servo_twist": largest speed [m/s].
        max_angular: "servo_twist": largest angular speed [rad/s].
    """

    kind: str
    topic: str
    stop_time: float = 0.0
    frame: str = ""
    gain: float = 0.0
    max_linear: float = 0.0
    max_angular: float = 0.0


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
        interfaces: The interfaces that the robot has, by kind.
    """

    source: Path
    images: tuple[ImageSource, ...]
    joint_states: str
    states: dict[str, tuple[str, ...]]
    arm: Arm
    gripper: Gripper | None
    action: Action
    limits: Limits
    interfaces: dict[str, Interface]

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        body = 6 if self.action.kind == "ee_delta" else len(self.arm.joints)
        return body + int(self.gripper is not None and self.gripper.action != "none")

    def state_dim(self, feature: str) -> int:
        """Length of a state feature."""
        return sum(_SIZES.get(component, len(self.arm.joints)) for component in self.states[feature])

    def interface(self, kind: str) -> Interface:
        """The settings of an interface.

        Raises:
            ConfigError: The robot has no such one, or one that needs a model of the arm without it.
        """
        if kind not in self.interfaces:
            raise ConfigError(
                f"{self.source} has no interface {kind!r}; it has {', '.join(self.interfaces)}."
            )
        if kind == "servo_twist" and self.arm.model is None:
            raise ConfigError(f"{self.source}: servo_twist needs arm.model and arm.tcp.")
        return self.interfaces[kind]
