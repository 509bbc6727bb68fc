"""Converts between ROS messages and NumPy arrays, and defines the nodes' quality-of-service
profiles.
"""

from __future__ import annotations

import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ObservationError
from ceed_vla.extras import remedy
from ceed_vla.ros_nodes.robot.images import read_compressed, read_image

try:
    from builtin_interfaces.msg import Time
    from rclpy.node import Node
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import CompressedImage, Image
except ImportError as error:
    raise ImportError(f"ROS 2 is not importable here: {remedy('ros2')}.") from error

# Cameras: only the newest image matters; an old image in a queue adds latency. Joint states queue:
# those of an arm and of a gripper arrive on one topic, often within a millisecond, and with a depth
# of 1 one would always replace the other.
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
JOINT_STATES = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
# Values that a late subscriber must also receive: the instruction, success.
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# Commands to controllers; the profile matches ros2_control, which subscribes with the system's
# default.
COMMAND = QoSProfile(depth=10)

_UNNUMBERED = 2**64 - 1  # number from a middleware that does not number messages


def image_to_array(message: Image) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of an image, red first, without row padding; raises as
    `read_image` does.
    """
    return read_image(serialize_message(message)).pixels()


def compressed_to_array(message: CompressedImage) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of a JPEG or PNG image, red first.

    `ObservationError`: The data are not an image of these types.
    """
    return read_compressed(serialize_message(message)).pixels()


def array_to_image(pixels: NDArray[np.uint8], stamp: Time, frame_id: str) -> Image:
    """Return an rgb8 image message of pixels (H, W, 3) uint8."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ObservationError(
            f"Pixels of shape {pixels.shape} and type {pixels.dtype}; give (H, W, 3) uint8."
        )
    message = Image(
        height=pixels.shape[0], width=pixels.shape[1], encoding="rgb8", step=3 * pixels.shape[1]
    )
    message.header.stamp, message.header.frame_id = stamp, frame_id
    # any other sequence is copied element by element
    message.data = array.array("B", pixels.tobytes())
    return message


def seconds(stamp: Any) -> float:
    """Return a message's time stamp [s]."""
    return float(stamp.sec) + 1e-9 * float(stamp.nanosec)


def message_number(information: Mapping[str, Any]) -> int | None:
    """Return the publisher's number of a message, from rclpy's message information; None if it has
    none.
    """
    number = information.get("publication_sequence_number")
    return number if isinstance(number, int) and 0 < number < _UNNUMBERED else None


def clock_time(node: Node) -> float:
    """Return the time that stamps a node's messages [s]; simulated with use_sim_time."""
    return 1e-9 * float(node.get_clock().now().nanoseconds)
