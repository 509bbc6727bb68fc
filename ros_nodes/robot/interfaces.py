"""Commands as the messages that ros2_control's controllers and MoveIt Servo take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import TwistStamped
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.publisher import Publisher
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ceed_vla.errors import ConfigError
from ros_nodes.robot.messages import COMMAND
from ros_nodes.robot.robot_config import Interface

if TYPE_CHECKING:
    from ros_nodes.robot.kinematics import ArmKinematics

Array = NDArray[np.float64]

GRIPPER_PERIOD = 0.1  # an unchanged gripper command is repeated this often [s]


class ArmInterface(Protocol):
    """Sends an arm's commands."""

    publishers: tuple[Publisher, ...]

    def send(self, positions: Array, velocities: Array, measured: Array) -> None:
        """Send one command.

        Args:
            positions: (J,) [rad].
            velocities: (J,) from the last command to this one; zero on a hold [rad/s].
            measured: (J,) [rad].
        """
        ...


class ForwardPosition:
    """``forward_command_controller``: the positions, in the controller's fixed order of joints."""

    def __init__(self, node: Node, interface: Interface) -> None:
        self._publisher = node.create_publisher(Float64MultiArray, interface.topic, COMMAND)
        self.publishers: tuple[Publisher, ...] = (self._publisher,)

    def send(self, positions: Array, velocities: Array, measured: Array) -> None:
        """See `ArmInterface.send`."""
        self._publisher.publish(Float64MultiArray(data=positions.tolist()))


class JointTrajectories:
    """``joint_trajectory_controller``: the next command and, in case no other follows, a stop within ``stop_time``.

    Stamp 0 starts a trajectory when it arrives; each replaces the one before.

    Args:
        node: Publishes.
        interface: Topic and stop time.
        joints: Names, in the order of the positions.
        period: Time between commands [s].
        low: (J,) lowest positions [rad]: the stop stays inside too.
        high: (J,) highest positions [rad].
    """

    def __init__(
        self, node: Node, interface: Interface, joints: Sequence[str], period: float, low: Array, high: Array
    ) -> None:
        self._publisher = node.create_publisher(JointTrajectory, interface.topic, COMMAND)
        self.publishers: tuple[Publisher, ...] = (self._publisher,)
        self._joints, self._low, self._high = list(joints), low, high
        self._period, self._stop_time = period, interface.stop_time

    def send(self, positions: Array, velocities: Array, measured: Array) -> None:
        """See `ArmInterface.send`."""
        stop = np.clip(positions + 0.5 * self._stop_time * velocities, self._low, self._high)
        message = JointTrajectory(joint_names=self._joints)
        message.points = [
            _point(self._period, positions, velocities),
            _point(self._period + self._stop_time, stop, np.zeros_like(stop)),
        ]
        self._publisher.publish(message)


class ServoTwists:
    """MoveIt Servo with ``command_in_type: speed_units``: the velocity of the commanded TCP, in the base frame.

    Twists alone would drift from the commanded pose; the measured distance times ``gain`` is added. A hold is a zero
    twist.

    Args:
        node: Publishes, and gives the time of the stamps.
        interface: Topic, frame, gain and limits.
        kinematics: Of the arm.
        period: Time between commands [s].
    """

    def __init__(self, node: Node, interface: Interface, kinematics: ArmKinematics, period: float) -> None:
        self._publisher = node.create_publisher(TwistStamped, interface.topic, COMMAND)
        self.publishers: tuple[Publisher, ...] = (self._publisher,)
        self._clock, self._interface, self._kinematics = node.get_clock(), interface, kinematics
        self._period = period

    def send(self, positions: Array, velocities: Array, measured: Array) -> None:
        """See `ArmInterface.send`."""
        message = TwistStamped()
        message.header.stamp, message.header.frame_id = self._clock.now().to_msg(), self._interface.frame
        if velocities.any():
            linear, angular = self._twist(positions, velocities, measured)
            for vector, values in ((message.twist.linear, linear), (message.twist.angular, angular)):
                vector.x, vector.y, vector.z = values.tolist()
        self._publisher.publish(message)

    def _twist(self, positions: Array, velocities: Array, measured: Array) -> tuple[Array, Array]:
        """Linear (3,) [m/s] and angular velocity (3,) [rad/s]."""
        now = self._kinematics.forward(positions)
        before = self._kinematics.forward(positions - self._period * velocities)
        actual = self._kinematics.forward(measured)
        linear = (now[0] - before[0]) / self._period + self._interface.gain * (now[0] - actual[0])
        angular = _turn(before[1], now[1]) / self._period + self._interface.gain * _turn(actual[1], now[1])
        return _shorten(linear, self._interface.max_linear), _shorten(angular, self._interface.max_angular)


class GripperCommands:
    """[opening in metres], when it changes and every `GRIPPER_PERIOD`."""

    def __init__(self, node: Node, topic: str) -> None:
        self._publisher = node.create_publisher(Float64MultiArray, topic, COMMAND)
        self.publishers: tuple[Publisher, ...] = (self._publisher,)
        self._last: tuple[float, float] | None = None

    def send(self, opening: float, now: float) -> None:
        """Send an opening [m] at `now` [s], unless it was sent just before."""
        if (
            self._last is not None
            and self._last[0] == opening
            and 0.0 <= now - self._last[1] < GRIPPER_PERIOD
        ):
            return
        self._publisher.publish(Float64MultiArray(data=[opening]))
        self._last = (opening, now)


def make_interface(
    node: Node,
    interface: Interface,
    joints: Sequence[str],
    period: float,
    limits: tuple[Array, Array],
    kinematics: ArmKinematics | None,
) -> ArmInterface:
    """The interface of a kind; `limits` are the lowest and highest positions (J,) [rad].

    Raises:
        ConfigError: Twists without kinematics.
    """
    if interface.kind == "forward_position":
        return ForwardPosition(node, interface)
    if interface.kind == "joint_trajectory":
        return JointTrajectories(node, interface, joints, period, *limits)
    if kinematics is None:
        raise ConfigError("servo_twist needs the arm's model (arm.model in the robot's file).")
    return ServoTwists(node, interface, kinematics, period)


def _point(after: float, positions: Array, velocities: Array) -> JointTrajectoryPoint:
    nanoseconds = round(1e9 * after)
    return JointTrajectoryPoint(
        positions=positions.tolist(),
        velocities=velocities.tolist(),
        time_from_start=Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9),
    )


def _turn(start: Array, end: Array) -> Array:
    """Rotation vector (3,) from quaternion `start` to `end`, wxyz (4,), in the base frame [rad]."""
    w = float(start @ end)
    vector = start[0] * end[1:] - end[0] * start[1:] + np.cross(end[1:], -start[1:])
    vector = vector if w >= 0.0 else -vector
    size = float(np.linalg.norm(vector))
    return vector * (2.0 * np.arctan2(size, abs(w)) / size) if size > 1e-12 else np.zeros(3)


def _shorten(vector: Array, limit: float) -> Array:
    size = float(np.linalg.norm(vector))
    return vector if size <= limit else vector * (limit / size)
