"""Headers of serialized images, and the pixels that a policy receives."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra ros2)")

from builtin_interfaces.msg import Time
from PIL import Image as PillowImage
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.demo.camera_load import Load, scene
from ceed_vla.ros_nodes.robot.images import (
    MAX_PIXELS,
    Seen,
    Shown,
    View,
    decode,
    message_stamp,
    read_compressed,
    read_image,
)
from ceed_vla.ros_nodes.robot.messages import array_to_image

Crop = tuple[int, ...]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
SCENE = scene(Load(320, 180), 0)


def raw(pixels: np.ndarray = PIXELS, frame: str = "front", **changes: Any) -> bytes:
    message = array_to_image(pixels, Time(sec=3, nanosec=500_000_000), frame)
    for name, value in changes.items():
        setattr(message, name, value)
    return bytes(serialize_message(message))


def compressed(data: bytes, format: str = "jpeg") -> bytes:
    message = CompressedImage(format=format, data=data)
    message.header.stamp = Time(sec=3, nanosec=500_000_000)
    return bytes(serialize_message(message))


def file(kind: str, pixels: np.ndarray = SCENE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The reference: decode all pixels, then scale bilinearly."""
    image = PillowImage.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), PillowImage.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("frame", ["", "a", "front", "x" * 1000])
def test_the_header_of_a_raw_image_is_read_wherever_its_texts_end(frame: str) -> None:
    image = read_image(raw(frame=frame))
    assert (image.stamp, image.height, image.width, image.step) == (3.5, 6, 9, 27)
    np.testing.assert_array_equal(image.pixels(), PIXELS)


def test_both_byte_orders_are_read_and_no_other_serialization() -> None:
    header = struct.pack(">iII", 3, 500_000_000, 1) + b"\0\0\0\0"
    header += struct.pack(">III", 2, 1, 5) + b"rgb8\0" + b"\0" + b"\0\0" + struct.pack(">II", 3, 6)
    big = b"\0\0\0\0" + header + bytes(range(6))
    image = read_image(big)
    assert (image.stamp, image.height, image.width, image.step) == (3.5, 2, 1, 3)
    np.testing.assert_array_equal(image.pixels().ravel(), range(6))
    for start in (b"\0\x02\0\0", b"\x01\x01\0\0", b"", b"\0"):
        with pytest.raises(ObservationError, match="only CDR"):
            read_image(start + big[4:] if len(start) == 4 else start)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_padding_behind_a_message_is_no_part_of_its_image(padding: int) -> None:
    image = read_image(raw() + b"\xff" * padding)
    np.testing.assert_array_equal(image.pixels(), PIXELS)


@pytest.mark.parametrize("message", [raw(), compressed(file("JPEG")), compressed(file("PNG"))])
def test_a_message_that_was_cut_or_changed_anywhere_raises_nothing_else(message: bytes) -> None:
    read = read_image if b"rgb8" in message[:80] else read_compressed
    rng = np.random.default_rng(0)
    for cut in [*range(120), *rng.integers(0, len(message), 20)]:
        with suppress(ObservationError):
            read(message[:cut]).pixels()
    for _ in range(300):
        changed = bytearray(message)
        for at in rng.integers(0, 100, 3):
            changed[at] = rng.integers(0, 256)
        with suppress(ObservationError):
            read(bytes(changed)).pixels(View(4, 4, resize=True))


def test_nothing_of_an_image_is_copied_to_read_its_header() -> None:
    message = raw()
    assert read_image(message).data is message


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_size_of_a_compressed_image_is_known_before_it_is_decoded(kind: str) -> None:
    whole = file(kind)
    image = read_compressed(compressed(whole[: len(whole) // 2]))
    assert (image.stamp, image.height, image.width) == (3.5, 180, 320)
    with pytest.raises(ObservationError, match=r"cannot be read: .*Send JPEG or PNG"):
        image.pixels()


def test_jpeg_headers_with_other_segments_are_read() -> None:
    exif = PillowImage.Exif()
    exif[0x010E] = "x" * 3000
    for options in (
        {"exif": exif},
        {"progressive": True},
        {"icc_profile": b"y" * 200_000},
        {"comment": b"z" * 500},
    ):
        image = read_compressed(compressed(file("JPEG", **options)))
        assert (image.height, image.width) == (180, 320)
        assert image.pixels().shape == (180, 320, 3)
    padded = file("JPEG")
    padded = padded[:2] + b"\xff" * 20 + padded[2:]
    assert read_compressed(compressed(padded)).width == 320


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header declares this size."""
    whole = file("PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def jpeg_of(height: int, width: int) -> bytes:
    """Return a JPEG whose header declares this size."""
    whole = bytearray(file("JPEG"))
    at = whole.index(b"\xff\xc0") + 5
    whole[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a" + bytes(100), "neither JPEG nor PNG"),
        (b"\xff\xd8", "neither JPEG nor PNG"),
        (b"\xff\xd8" + b"\xff" * 1_000_000, "neither JPEG nor PNG"),
        # a million bytes of segments
        (
            b"\xff\xd8" + b"\xff\xfe\x00\x02" * 250_000,
            "neither JPEG nor PNG",
        ),
        (bomb(0, 10), "it is empty: 0 x 10 pixels"),
        (bomb(100_000, 100_000), f"100000 x 100000 pixels, more than {MAX_PIXELS}"),
        (bomb(2**32 - 1, 2**32 - 1), "more than"),
        (jpeg_of(0, 320), "it is empty: 320 x 0 pixels"),
        (jpeg_of(60_000, 60_000), "60000 x 60000 pixels, more than"),
    ],
)
def test_what_no_decoder_may_see_is_refused_by_its_header(data: bytes, reason: str) -> None:
    with pytest.raises(ObservationError, match=reason) as caught:
        read_compressed(compressed(data, "jpeg"))
    assert "Send JPEG or PNG" in str(caught.value)


def test_a_decoder_that_finds_another_size_than_the_header_said_is_stopped() -> None:
    message = compressed(bomb(6000, 6000))
    image = read_compressed(compressed(file("PNG")))
    lie = replace(image, data=message, end=len(message))
    with pytest.raises(ObservationError, match="6000 x 6000 pixels, more than"):
        lie.pixels(View(180, 320))


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
@pytest.mark.parametrize("crop", [(), (20, 40, 100, 150)])
def test_raw_images_are_cropped_and_scaled_as_ever(encoding: str, crop: tuple[int, ...]) -> None:
    data = SCENE if encoding == "rgb8" else SCENE[:, :, ::-1]
    padded = np.zeros((180, 3 * 320 + 5), np.uint8)
    padded[:, : 3 * 320] = data.reshape(180, -1)
    message = raw(SCENE, encoding=encoding, step=3 * 320 + 5, data=padded.tobytes())
    kept = SCENE[20:120, 40:190] if crop else SCENE
    seen = read_image(message).pixels(View(48, 64, resize=True, crop=crop))
    np.testing.assert_allclose(seen.astype(int), resized(kept, 48, 64), atol=2)
    same = read_image(message).pixels(View(*kept.shape[:2], crop=crop))
    np.testing.assert_array_equal(same, kept)


@pytest.mark.parametrize("crop", [(), (33, 57, 200, 330)])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (20, 30), (150, 200), (300, 300)])
def test_a_jpeg_decoded_smaller_looks_the_same(height: int, width: int, crop: Crop) -> None:
    """It differs by at most a few of 255 levels from decoding all pixels, mostly by less than 1."""
    pixels = scene(Load(641, 363), 1)  # a size that no power of two divides
    message = compressed(file("JPEG", pixels, quality=90))
    image = read_compressed(message)
    full = image.pixels()
    if crop:
        full = full[33:233, 57:387]
    seen = image.pixels(View(height, width, resize=True, crop=crop)).astype(int)
    difference = np.abs(seen - resized(full, height, width))
    assert difference.max() <= 6
    assert difference.mean() < 0.6


def test_an_image_that_is_not_scaled_is_decoded_exactly() -> None:
    image = read_compressed(compressed(file("JPEG")))
    exact = np.asarray(PillowImage.open(io.BytesIO(file("JPEG"))))
    np.testing.assert_array_equal(image.pixels(View(180, 320)), exact)
    cropped = image.pixels(View(96, 96, crop=(3, 5, 96, 96)))
    np.testing.assert_array_equal(cropped, exact[3:99, 5:101])


def test_grey_and_cmyk_images_become_red_green_and_blue() -> None:
    grey = file("JPEG", SCENE[:, :, 0])
    assert read_compressed(compressed(grey)).pixels(View(48, 64, resize=True)).shape == (48, 64, 3)
    buffer = io.BytesIO()
    PillowImage.fromarray(SCENE).convert("CMYK").save(buffer, "JPEG")
    image = read_compressed(compressed(buffer.getvalue()))
    assert image.pixels(View(48, 64, resize=True)).shape == (48, 64, 3)


def test_images_are_the_same_whatever_their_stamps_and_frames() -> None:
    one = read_image(raw())
    other = read_image(raw(frame="another"))
    assert one.same(other)
    assert not one.same(None)
    changed = PIXELS.copy()
    changed[-1, -1, -1] ^= 1
    assert not one.same(read_image(raw(changed)))
    assert not one.same(read_image(raw(PIXELS[:3])))


@pytest.mark.parametrize(
    ("size", "crop", "said"),
    [
        ((720, 1280), (), "1280 x 720 pixels (aspect 1.78) into the policy's 96 x 96 (1.00)"),
        ((720, 1280), (0, 0, 720, 900), "crop to about 720 x 720"),
        ((480, 480), (), ""),
        ((720, 1280), (0, 280, 720, 720), ""),
        ((481, 480), (), ""),
    ],
)
def test_scaling_that_distorts_is_told(size: tuple[int, int], crop: Crop, said: str) -> None:
    told = View(96, 96, resize=True, crop=crop).distortion(*size)
    assert said in told
    assert bool(told) == bool(said)


def test_an_observation_is_decoded_around_its_bad_images() -> None:
    view = View(48, 64, resize=True)
    blank = np.full((60, 80, 3), 7, np.uint8)
    spot = blank.copy()
    spot[1, 1, 1] = 8  # the comparison of a few pixels misses it
    damaged = file("JPEG")[:400]
    observation = {
        "good": Shown(read_image(raw(SCENE)), view),
        "blank": Shown(read_image(raw(blank)), view),
        "spot": Shown(read_image(raw(spot)), View(60, 80)),
        "bad": Shown(read_compressed(compressed(damaged)), view),
        "state": np.ones(3),
    }
    decoded, seen = decode(observation)
    assert set(decoded) == {"good", "blank", "spot", "state"}
    assert decoded["good"].shape == (48, 64, 3)
    assert decoded["state"] is observation["state"]
    assert seen.blank == ("blank",)
    assert {feature for feature, problem in seen.problems.items() if problem} == {"bad"}
    assert "cannot be read" in seen.problem
    assert seen.seconds > 0.0
    assert Seen({"good": None}).problem == ""


def test_the_stamp_of_a_bad_image_is_read_where_it_can_be() -> None:
    assert message_stamp(raw(encoding="mono8")) == 3.5
    assert message_stamp(b"\0\x01\0\0\0") is None


def test_messages_are_read_as_rclpy_reads_them() -> None:
    """Our reader of serialized messages agrees with the middleware's own."""
    from rclpy.serialization import deserialize_message

    for frame, encoding in (("", "rgb8"), ("camera_link", "bgr8")):
        message = raw(frame=frame, encoding=encoding)
        theirs = deserialize_message(message, Image)
        ours = read_image(message)
        assert bytes(theirs.data) == ours.data[ours.begin : ours.end]
        assert (theirs.height, theirs.width, theirs.step) == (ours.height, ours.width, ours.step)
        assert theirs.encoding == ours.encoding
