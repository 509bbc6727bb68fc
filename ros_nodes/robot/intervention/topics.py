"""Subscriptions to a person's device and its button."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from std_msgs.msg import Bool

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot.intervention.person import Person
from ceed_vla.ros_nodes.robot.messages import JOINT_STATES
from ceed_vla.ros_nodes.robot.robot_config import RobotConfig


def intervention_inputs(
    node: Node, robot: RobotConfig, person: Person | None, clock: Callable[[], float]
) -> list[Any]:
    """Subscribe to the device of a robot's file; returns the subscriptions, none without one.

    `clock` is that of the controller's ticks [s].
    """
    if robot.intervention is None or person is None:
        return []
    device = robot.intervention.device

    def take(message: Any) -> None:
        now = clock()
        try:
            wish = device.read(message, now)
        except ObservationError as error:
            person.refuse(str(error))
            node.get_logger().warning(f"Intervention: {error}", throttle_duration_sec=1.0)
        else:
            person.take(wish, now)

    inputs = [node.create_subscription(device.message_class, device.topic, take, JOINT_STATES)]

    def press(message: Any) -> None:
        person.press(message.data, clock())

    if robot.intervention.button_topic:
        topic = robot.intervention.button_topic
        inputs.append(node.create_subscription(Bool, topic, press, JOINT_STATES))
    return inputs
