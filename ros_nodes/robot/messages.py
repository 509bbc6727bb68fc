"""ROS messages to NumPy arrays and back, and the quality-of-service profiles that every node here uses."""

from __future__ import annotations

import array
import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ObservationError
from ros_nodes.robot.texts import short, shown

try:
    from builtin_interfaces.msg import Time
    from rclpy.node import Node
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CompressedImage, Image
except ImportError as error:
    raise ImportError(
        "ROS 2 is not importable here: install the extra 'ros2' (pip install 'ceed_vla[ros2]', x86_64 Linux), "
        "or source a ROS 2 installation that has rclpy and the packages of package.xml."
    ) from error

# Cameras: the newest image wins, an old one in a queue only adds latency. Joint states queue: an arm's and a gripper's
# come on one topic, often within a millisecond, and with a depth of 1 the second would always replace the first.
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
JOINT_STATES = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
# Values that a late subscriber must get too: the instruction, success.
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# Commands to controllers; ros2_control subscribes to them with the system's default, which this matches.
COMMAND = QoSProfile(depth=10)

ENCODINGS = ("rgb8", "bgr8")
MAX_PIXELS = 25_000_000  # of a compressed image; more take seconds to read, and the commands would wait


def image_to_array(message: Image) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of an image, red first, without the padding of its rows. May share the message's memory.

    `ObservationError`: Another encoding than rgb8 and bgr8, no pixels, or data that `step` and `height` contradict.
    """
    if message.encoding not in ENCODINGS:
        raise ObservationError(
            f"The image has encoding {shown(message.encoding)}; use {' or '.join(ENCODINGS)} "
            "(set it in the camera driver, or convert with image_proc)."
        )
    height, width, step = message.height, message.width, message.step
    if not height or not width:
        raise ObservationError(f"The image is empty: {width} x {height} pixels.")
    if step < 3 * width:
        raise ObservationError(
            f"The image has step {step}; a row of {width} {message.encoding} pixels takes {3 * width} bytes."
        )
    data = np.frombuffer(message.data, np.uint8)
    if data.size != step * height:
        raise ObservationError(f"The image has {data.size} bytes; step {step} x height {height} makes {step * height}.")
    pixels = data.reshape(height, step)[:, : 3 * width].reshape(height, width, 3)
    return pixels if message.encoding == "rgb8" else pixels[:, :, ::-1]


def compressed_to_array(message: CompressedImage) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a JPEG or PNG image, red first; `ObservationError` if the data are none."""
    from PIL import Image as PillowImage

    data = io.BytesIO(bytes(message.data))
    try:
        with (
            warnings.catch_warnings(action="ignore", category=PillowImage.DecompressionBombWarning),
            PillowImage.open(data, formats=("JPEG", "PNG")) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise ObservationError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise some ten kinds on damaged files
        raise ObservationError(
            f"The compressed image (format {shown(message.format)}, {len(message.data)} bytes) cannot be read: "
            f"{short(error)}. Send JPEG or PNG."
        ) from error


def array_to_image(pixels: NDArray[np.uint8], stamp: Time, frame_id: str) -> Image:
    """An rgb8 image message of pixels (H, W, 3) uint8."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ObservationError(f"Pixels of shape {pixels.shape} and type {pixels.dtype}; give (H, W, 3) uint8.")
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="rgb8", step=3 * pixels.shape[1])
    message.header.stamp, message.header.frame_id = stamp, frame_id
    message.data = array.array("B", pixels.tobytes())  # any other sequence is copied element by element
    return message


def seconds(stamp: Any) -> float:
    """A message's time stamp [s]."""
    return float(stamp.sec) + 1e-9 * float(stamp.nanosec)


def clock_time(node: Node) -> float:
    """Time that a node's messages are stamped with [s]; the simulation's with use_sim_time."""
    return 1e-9 * float(node.get_clock().now().nanoseconds)
