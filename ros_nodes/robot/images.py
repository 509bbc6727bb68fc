"""Camera images: their headers as they come, their pixels when they are needed. Free of ROS.

The thread that sends commands reads headers, in a time that does not depend on the number of
pixels; decoding, cropping and scaling belong to the inference thread. A serialized
`sensor_msgs/Image` stays the middleware's bytes: rclpy's conversion to a message would copy them.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ObservationError
from ceed_vla.ros_nodes.robot.texts import short, shown

if TYPE_CHECKING:
    from PIL import Image as PillowImage

ENCODINGS = ("rgb8", "bgr8")
JPEG, PNG = "jpeg", "png"
MAX_PIXELS = 25_000_000  # of a compressed image; more take seconds to decode
SQUEEZED = 0.02  # relative difference of two aspect ratios that is worth a warning
Box = tuple[int, int, int, int]  # top, left, height, width [px]
_SEGMENTS = 1000  # of a JPEG's header that are looked through; files have some ten
_KEPT = 2  # sides of a JPEG are decoded in at least so many times the pixels that the policy sees


@dataclass(frozen=True)
class View:
    """What a policy sees of a camera's images.

    Attributes:
        height: Of the policy's images [px].
        width: Of the policy's images [px].
        resize: Scale images to that size; otherwise another size is an error.
        crop: Top, left, height, width [px] of what is kept before; empty for all.
    """

    height: int
    width: int
    resize: bool = False
    crop: tuple[int, ...] = ()

    def box(self, height: int, width: int) -> Box:
        """Top, left, height, width [px] of what is kept of an image.

        `ObservationError`: It does not fit.
        """
        if not self.crop:
            top = 0
            left = 0
            kept_height = height
            kept_width = width
        else:
            top, left, kept_height, kept_width = self.crop
        if top + kept_height > height or left + kept_width > width:
            kept = f"the robot's file crops {list(self.crop)} of it"
            raise ObservationError(f"The image is {width} x {height} pixels; {kept}.")
        if (kept_height, kept_width) != (self.height, self.width) and not self.resize:
            raise ObservationError(
                f"The image is {kept_width} x {kept_height} pixels; the policy was trained on "
                f"{self.width} x {self.height}. Set the camera to it, "
                "or resize: true in the robot's file."
            )
        return top, left, kept_height, kept_width

    def distortion(self, height: int, width: int) -> str:
        """What scaling does to an image of that size where it changes the aspect ratio, or ""."""
        _, _, kept_height, kept_width = self.box(height, width)
        aspect = kept_width / kept_height
        wanted = self.width / self.height
        if abs(aspect / wanted - 1.0) <= SQUEEZED:
            return ""
        side = min(kept_height * self.width, kept_width * self.height)
        height = side // self.width
        width = side // self.height
        return (
            f"resize squeezes {kept_width} x {kept_height} pixels (aspect {aspect:.2f}) into "
            f"the policy's {self.width} x {self.height} ({wanted:.2f}); "
            f"if it was not trained so, crop to about {width} x {height} in the robot's file"
        )


@dataclass(frozen=True)
class CameraImage:
    """An image whose header was validated and whose pixels were not read.

    Attributes:
        stamp: When it was taken [s].
        encoding: "rgb8", "bgr8", "jpeg" or "png".
        height: [px].
        width: [px].
        step: Bytes of a row; 0 if it is compressed.
        data: The message that holds it.
        begin: Where in `data` it begins.
        end: Where it ends.
    """

    stamp: float
    encoding: str
    height: int
    width: int
    step: int
    data: bytes
    begin: int
    end: int

    def same(self, other: CameraImage | None) -> bool:
        """Whether both have the same bytes; the comparison of memory ends where they differ."""
        if other is None or self.end - self.begin != other.end - other.begin:
            return False
        theirs = memoryview(other.data)[other.begin : other.end]
        return self.data.startswith(theirs, self.begin, self.end)

    def pixels(self, view: View | None = None) -> NDArray[np.uint8]:
        """Pixels (H, W, 3), red first, as a `view` has them; without one all of them.

        `ObservationError`: Data that cannot be decoded, or that do not fit the view.
        """
        view = view or View(self.height, self.width)
        try:
            return self._raw(view) if self.encoding in ENCODINGS else self._decoded(view)
        except ObservationError:
            raise
        except Exception as error:  # Pillow's readers raise some ten kinds on damaged files
            raise _unreadable(self.encoding, self.end - self.begin, short(error)) from error

    @property
    def _bytes(self) -> memoryview:
        return memoryview(self.data)[self.begin : self.end]

    def _raw(self, view: View) -> NDArray[np.uint8]:
        box = view.box(self.height, self.width)
        top, left, height, width = box
        data = np.frombuffer(self._bytes, np.uint8)
        if (height, width) == (view.height, view.width):  # needs no Pillow
            rows = data.reshape(self.height, self.step)[:, : 3 * self.width]
            whole = rows.reshape(self.height, self.width, 3)
            pixels = whole[top : top + height, left : left + width]
            return np.ascontiguousarray(pixels if self.encoding == "rgb8" else pixels[:, :, ::-1])
        from PIL import Image as PillowImage

        order = "RGB" if self.encoding == "rgb8" else "BGR"
        size = (self.width, self.height)
        image = PillowImage.frombuffer("RGB", size, data, "raw", order, self.step, 1)
        return _scaled(image, view, box, 1.0)

    def _decoded(self, view: View) -> NDArray[np.uint8]:
        from PIL import Image as PillowImage

        with PillowImage.open(io.BytesIO(self._bytes), formats=[self.encoding.upper()]) as image:
            problem = _size_problem(image.height, image.width)
            if problem:  # the header said another size
                raise ObservationError(problem)
            box = view.box(image.height, image.width)
            _, _, height, width = box
            scale = 1.0
            if self.encoding == JPEG and (height, width) != (view.height, view.width):
                # Decodes a half, a quarter or an eighth of its size where that is enough: 4 ms
                # instead of 12 for 1920 x 1080 pixels that become 96 x 96.
                enough = (
                    math.ceil(_KEPT * view.width * image.width / width),
                    math.ceil(_KEPT * view.height * image.height / height),
                )
                full = image.width
                drafted = image.draft("RGB", enough)
                scale = drafted[1][2] / full if drafted else 1.0
            return _scaled(image if image.mode == "RGB" else image.convert("RGB"), view, box, scale)


def _scaled(image: PillowImage.Image, view: View, box: Box, scale: float) -> NDArray[np.uint8]:
    """The `box` of an image in the view's size; the image was scaled by `scale` already."""
    from PIL import Image as PillowImage

    top, left, height, width = box
    right = left + width
    bottom = top + height
    part = (left * scale, top * scale, right * scale, bottom * scale)
    if scale == 1.0 and image.size != (width, height):  # `resize` would look beyond its box
        image = image.crop((left, top, right, bottom))
        part = (0.0, 0.0, float(width), float(height))
    size = (view.width, view.height)
    if image.size == size:
        return np.asarray(image)
    return np.asarray(image.resize(size, PillowImage.Resampling.BILINEAR, box=part))


@dataclass(frozen=True)
class Shown:
    """What a policy is shown of a camera: an image, and the part of it that counts."""

    image: CameraImage
    view: View

    def pixels(self) -> NDArray[np.uint8]:
        """As `CameraImage.pixels`."""
        return self.image.pixels(self.view)


@dataclass(frozen=True)
class Seen:
    """What decoding the images of an observation has found.

    Attributes:
        problems: Feature -> why its image is bad; None if it is good.
        blank: Features whose pixels all have one colour.
        seconds: Time that it took [s].
    """

    problems: Mapping[str, str | None] = field(default_factory=dict)
    blank: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def problem(self) -> str:
        """What the first bad image lacks; "" if all are good."""
        return next(filter(None, self.problems.values()), "")


def decode(observation: Mapping[str, Any]) -> tuple[dict[str, Any], Seen]:
    """The observation with pixels in the place of `Shown` images, and what they are like.

    A bad image is left out.
    """
    started = time.monotonic()
    decoded: dict[str, Any] = {}
    problems: dict[str, str | None] = {}
    blank: list[str] = []
    for feature, value in observation.items():
        if not isinstance(value, Shown):
            decoded[feature] = value
            continue
        try:
            pixels = value.pixels()
        except ObservationError as error:
            problems[feature] = str(error)
            continue
        problems[feature] = None
        decoded[feature] = pixels
        few = pixels[::4, ::4]  # most images end the comparison here
        if (few == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all():
            blank.append(feature)
    return decoded, Seen(problems, tuple(blank), time.monotonic() - started)


class _Reader:
    """Reads the fields of a serialized message in order.

    `ObservationError`: It is no CDR, or ends before them.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < 4 or data[0] or data[1] not in (0, 1):
            raise ObservationError(
                f"The message is serialized as {data[:2].hex() or 'nothing'}; "
                "only CDR (0000, 0001) is read. "
                "Use a middleware that sends it, such as Fast DDS, Cyclone DDS or Zenoh."
            )
        self._order = "<" if data[1] else ">"
        self._data = data
        self.at = 4

    def number(self, kind: str = "I") -> int:
        """A number of 4 bytes, or of one with `kind` "B"."""
        size = struct.calcsize(kind)
        self.at += -(self.at - 4) % size
        self._need(size)
        value = struct.unpack_from(self._order + kind, self._data, self.at)[0]
        self.at += size
        return int(value)

    def text(self) -> str:
        size = self.number()
        self._need(size)
        text = self._data[self.at : self.at + min(size, 200)]
        self.at += size
        return text.rstrip(b"\0").decode(errors="replace")

    def rest(self) -> tuple[int, int]:
        """Begin and end of a sequence of bytes, which ends the message but for padding."""
        size = self.number()
        have = len(self._data) - self.at
        if not 0 <= have - size < 4:
            raise ObservationError(f"The message has {have} bytes of image, not {size} as it says.")
        return self.at, self.at + size

    def stamp(self) -> float:
        """Of the message's header [s]; its frame is passed over."""
        stamp = self.number("i") + 1e-9 * self.number()
        self.text()
        return stamp

    def _need(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise ObservationError(f"The message ends within its header ({len(self._data)} bytes).")


def read_image(message: bytes) -> CameraImage:
    """The image of a serialized `sensor_msgs/Image`.

    `ObservationError`: Another encoding than rgb8 and bgr8, no pixels, or data that `step` and
    `height` contradict.
    """
    reader = _Reader(message)
    stamp = reader.stamp()
    height = reader.number()
    width = reader.number()
    encoding = reader.text()
    reader.number("B")  # is_bigendian: single bytes have no order
    step = reader.number()
    begin, end = reader.rest()
    if encoding not in ENCODINGS:
        raise ObservationError(
            f"The image has encoding {shown(encoding)}; use {' or '.join(ENCODINGS)} "
            "(set it in the camera driver, or convert with image_proc)."
        )
    if not height or not width:
        raise ObservationError(f"The image is empty: {width} x {height} pixels.")
    if step < 3 * width:
        row = f"a row of {width} {encoding} pixels takes {3 * width} bytes"
        raise ObservationError(f"The image has step {step}; {row}.")
    if end - begin != step * height:
        product = f"step {step} x height {height} makes {step * height}"
        raise ObservationError(f"The image has {end - begin} bytes; {product}.")
    return CameraImage(stamp, encoding, height, width, step, message, begin, end)


def read_compressed(message: bytes) -> CameraImage:
    """The image of a serialized `sensor_msgs/CompressedImage`, of which only the header is read.

    `ObservationError`: Neither JPEG nor PNG, no pixels, or more than `MAX_PIXELS`.
    """
    reader = _Reader(message)
    stamp = reader.stamp()
    told = reader.text()
    begin, end = reader.rest()
    data = memoryview(message)[begin:end]
    kind, size = "", None
    if data[:2] == b"\xff\xd8":
        kind = JPEG
        size = _jpeg_size(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        kind, size = PNG, (height, width)
    problem = _size_problem(*size) if size else "it has the header of neither"
    if size is None or problem:
        raise _unreadable(told, end - begin, problem)
    return CameraImage(stamp, kind, *size, 0, message, begin, end)


def message_stamp(message: bytes) -> float | None:
    """When the image of a serialized message was taken [s]; None if that cannot be read."""
    try:
        return _Reader(message).stamp()
    except ObservationError:
        return None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Height and width that the frame header of a JPEG says; None without one."""
    for marker, begin in _jpeg_segments(data):
        # Start of frame; C4, C8 and CC of these sixteen mean something else.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if begin + 7 > len(data):
                return None
            height, width = struct.unpack_from(">HH", data, begin + 3)
            return height, width
    return None


def _jpeg_segments(data: memoryview) -> Iterator[tuple[int, int]]:
    """(marker, where its length stands) of the header's segments."""
    at = 2
    for _ in range(_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        yield data[at + 1], at + 2
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _size_problem(height: int, width: int) -> str:
    """Why no image of that size is decoded; "" if it is."""
    if not height or not width:
        return f"it is empty: {width} x {height} pixels"
    if width * height > MAX_PIXELS:
        return f"it has {width} x {height} pixels, more than {MAX_PIXELS}"
    return ""


def _unreadable(kind: str, size: int, reason: str) -> ObservationError:
    what = f"The compressed image (format {shown(kind)}, {size} bytes)"
    return ObservationError(f"{what} cannot be read: {reason}. Send JPEG or PNG.")
