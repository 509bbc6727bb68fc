"""Conversion of messages to arrays and back; malformed messages are refused with the reason."""

from __future__ import annotations

import io
import math
from contextlib import suppress

import numpy as np
import pytest

pytest.importorskip("rclpy")

from builtin_interfaces.msg import Time
from PIL import Image as PillowImage
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot import messages
from ceed_vla.ros_nodes.robot.pose_trust import by_name

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def image(**changes: object) -> Image:
    message = messages.array_to_image(PIXELS, Time(sec=3, nanosec=5), "front")
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def test_image_survives_the_wire() -> None:
    message = deserialize_message(serialize_message(image()), Image)
    np.testing.assert_array_equal(messages.image_to_array(message), PIXELS)
    assert message.header.frame_id == "front"
    assert messages.seconds(message.header.stamp) == pytest.approx(3.000000005)


def test_bgr_is_turned() -> None:
    np.testing.assert_array_equal(
        messages.image_to_array(image(encoding="bgr8")), PIXELS[:, :, ::-1]
    )


def test_padded_rows_are_cut() -> None:
    padded = np.zeros((4, 20), np.uint8)
    padded[:, :15] = PIXELS.reshape(4, 15)
    np.testing.assert_array_equal(
        messages.image_to_array(image(step=20, data=padded.tobytes())), PIXELS
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "mono8"}, "'mono8'; use rgb8 or bgr8"),
        ({"encoding": ""}, "encoding ''"),
        ({"height": 0}, "5 x 0"),
        ({"width": 0}, "0 x 4"),
        ({"step": 14}, "step 14; a row of 5 rgb8 pixels takes 15"),
        ({"step": 16}, "60 bytes; step 16 x height 4 makes 64"),
        ({"data": b""}, "0 bytes"),
        ({"width": 2**32 - 1, "height": 2**32 - 1, "step": 2**32 - 1}, "step 4294967295; a row of"),
        ({"height": 2**32 - 1, "step": 2**32 - 1}, "step 4294967295 x height 4294967295"),
        ({"encoding": "x" * 10_000}, r"'x+\.\.\.x+'; use rgb8"),
    ],
)
def test_malformed_images_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        messages.image_to_array(image(**changes))


@pytest.mark.parametrize("pixels", [PIXELS[:, :, :2], PIXELS[0], PIXELS.astype(np.float32)])
def test_only_bytes_become_images(pixels: np.ndarray) -> None:
    with pytest.raises(ObservationError, match=r"give \(H, W, 3\) uint8"):
        messages.array_to_image(pixels, Time(), "")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_compressed_images(kind: str) -> None:
    flat = np.full((16, 24, 3), (200, 30, 60), np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(flat).save(file, kind, quality=95)
    pixels = messages.compressed_to_array(
        CompressedImage(format=kind.lower(), data=file.getvalue())
    )
    assert pixels.shape == (16, 24, 3)
    np.testing.assert_allclose(pixels, flat, atol=4)


def written(kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    PillowImage.new("1" if kind == "PNG" else "L", size).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        b"\x89PNG\r\n\x1a\n" + 20 * b"\0",
        written("JPEG", (64, 64))[:300],
        written("PNG", (6000, 6000)),
        written("PNG", (10_000, 10_000)),  # Pillow warns
        written("PNG", (20_000, 10_000)),  # Pillow refuses
    ],
)
def test_broken_compressed_images_are_refused(data: bytes) -> None:
    with pytest.raises(ObservationError, match=r"(?s)^.{,500}Send JPEG or PNG"):
        messages.compressed_to_array(CompressedImage(format="png", data=data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_images_raise_nothing_else(kind: str) -> None:
    whole, rng = written(kind, (40, 30)), np.random.default_rng(0)
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(8, len(data), 4)] = rng.integers(0, 256, 4)
        message = CompressedImage(
            format="x" * 1000, data=data[: rng.integers(8, len(data) + 1)].tobytes()
        )
        with suppress(ObservationError):
            assert messages.compressed_to_array(message).shape[2] == 3


def test_joints_are_matched_by_name() -> None:
    message = JointState(name=["c", "a", "b"], position=[3.0, 1.0, 2.0])
    positions = by_name(message.name, message.position, ["a", "c"], "positions")
    np.testing.assert_array_equal(positions, [1.0, 3.0])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (JointState(name=["a"], position=[1.0]), "lacks b; it has a"),
        (JointState(), "lacks a, b; it has no joints"),
        (JointState(name=["a", "b"], position=[1.0]), "2 names and 1 positions"),
        (JointState(name=["a", "a", "b"], position=[1.0, 2.0, 3.0]), "twice: a, a, b"),
        (JointState(name=["a"] * 10_000 + ["b"], position=[1.0] * 10_001), r"twice: a, .*\.\.\.\."),
        (JointState(name=["a", "b"], position=[1.0, math.nan]), "positions are not finite: b nan"),
        (JointState(name=["a", "b"], position=[math.inf, 0.0]), "positions are not finite: a inf"),
    ],
)
def test_malformed_joint_states_are_refused(message: JointState, error: str) -> None:
    with pytest.raises(ObservationError, match=error):
        by_name(message.name, message.position, ["a", "b"], "positions")


def test_latched_values_reach_late_subscribers_and_images_never_queue() -> None:
    assert messages.LATCHED.durability.name == "TRANSIENT_LOCAL"
    assert messages.SENSOR.depth == 1
    assert messages.JOINT_STATES.depth == 10  # those of arm and gripper may arrive together
    assert messages.JOINT_STATES.reliability.name == "BEST_EFFORT"
    assert messages.SENSOR.reliability.name == "BEST_EFFORT"
    assert messages.COMMAND.reliability.name == "RELIABLE"
