"""The topics that a configured policy node reads: joint states, images, and a person's device."""

# ceed_vla.ros_nodes.robot.messages is imported first, because its error explains a missing ROS.
from __future__ import annotations  # noqa: I001

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ceed_vla.ros_nodes.robot.messages import JOINT_STATES, SENSOR, clock_time, message_number

from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image, JointState

from ceed_vla.ros_nodes.robot.intervention.topics import intervention_inputs
from ceed_vla.ros_nodes.robot.observations import Camera
from ceed_vla.ros_nodes.robot.policy_setup import PolicySetup
from ceed_vla.ros_nodes.robot.safety import JOINT_STATES as JOINT_STATES_INPUT


class PolicyInputs:
    """The subscriptions; `close` ends them.

    Args:
        node: The node.
        setup: What takes the messages.
        now: Time of the controller's ticks [s].
        observed: Called after every image.

    Attributes:
        warnings: About images, since they were last taken.
    """

    def __init__(
        self,
        node: Node,
        setup: PolicySetup,
        now: Callable[[], float],
        observed: Callable[[], None],
    ) -> None:
        self.warnings: list[str] = []
        self._node, self._setup, self._observed = node, setup, observed
        self._subscriptions: list[Any] = []
        try:
            self._subscribe(now)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Destroy the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def take_warnings(self) -> str:
        """The warnings since the last call."""
        text = "; ".join(self.warnings)
        self.warnings.clear()
        return text

    def _subscribe(self, now: Callable[[], float]) -> None:
        node, setup, inputs = self._node, self._setup, self._subscriptions
        for topic, prefix in setup.robot.joint_topics.items():
            # rclpy passes the message's information too, but its types do not declare that
            take_joints: Any = partial(self._on_joint_states, topic, prefix)
            inputs.append(node.create_subscription(JointState, topic, take_joints, JOINT_STATES))
        inputs += intervention_inputs(node, setup.robot, setup.person, now)
        for camera in setup.observations.cameras:
            kind = CompressedImage if camera.source.transport == "compressed" else Image
            take = partial(self._on_image, camera)
            # raw: as bytes, because this thread has no time to convert pixels
            inputs.append(
                node.create_subscription(kind, camera.source.topic, take, SENSOR, raw=True)
            )

    def _on_joint_states(
        self, topic: str, prefix: str, message: JointState, information: Mapping[str, Any]
    ) -> None:
        setup = self._setup
        if prefix:
            message.name = [prefix + name for name in message.name]
        number = message_number(information)
        restarted = setup.sources.take(message.name, number, time.monotonic(), topic)
        if restarted:
            setup.controller.interrupt(f"{restarted} has another publisher than before")
        setup.safety.measure(*setup.observations.take_joints(message))
        setup.observations.arrived(JOINT_STATES_INPUT, clock_time(self._node))

    def _on_image(self, camera: Camera, message: bytes) -> None:
        warning = camera.take(message)
        self._setup.observations.arrived(camera.source.name, clock_time(self._node))
        if warning is not None:
            self._node.get_logger().warning(warning)
            self.warnings.append(warning)
        self._observed()
