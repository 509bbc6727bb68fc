"""Camera images: headers are read on arrival, pixels only on demand. Free of ROS.

The thread that sends commands reads only headers, in a time that does not depend on the number of
pixels; the inference thread decodes, crops and scales. A serialized `sensor_msgs/Image` is not
converted to a message, because rclpy would copy its bytes.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ceed_vla.errors import ObservationError
from ceed_vla.serving.predictor_types import Seen
from ceed_vla.texts import short, shown

if TYPE_CHECKING:
    from PIL import Image as PillowImage

ENCODINGS = ("rgb8", "bgr8")
JPEG, PNG = "jpeg", "png"
MAX_PIXELS = 25_000_000  # largest size of a compressed image; more pixels take seconds to decode
SQUEEZED = 0.02  # relative difference of two aspect ratios above which a warning is due
Box = tuple[int, int, int, int]  # top, left, height, width [px]
_SEGMENTS = 1000  # largest number of segments read from a JPEG's header; files have about ten
_OVERSAMPLING = 2  # smallest size of a decoded JPEG, as a multiple of the policy's height and width


@dataclass(frozen=True)
class View:
    """The part of a camera's images that a policy receives, and its size.

    Attributes:
        height: Height of the policy's images [px].
        width: Width of the policy's images [px].
        resize: Whether to scale images to that size; if not, another size is an error.
        crop: Top, left, height, width [px] of the part that is cut out before; empty for all.
    """

    height: int
    width: int
    resize: bool = False
    crop: tuple[int, ...] = ()

    def box(self, height: int, width: int) -> Box:
        """Return top, left, height and width [px] of the part that is cut out of an image.

        `ObservationError`: The image is too small for the crop, or needs scaling.
        """
        if not self.crop:
            top = 0
            left = 0
            cut_height = height
            cut_width = width
        else:
            top, left, cut_height, cut_width = self.crop
        if top + cut_height > height or left + cut_width > width:
            crop = f"the robot's file crops {list(self.crop)} of it"
            raise ObservationError(f"The image is {width} x {height} pixels; {crop}.")
        if (cut_height, cut_width) != (self.height, self.width) and not self.resize:
            raise ObservationError(
                f"The image is {cut_width} x {cut_height} pixels; the policy was trained on "
                f"{self.width} x {self.height}. Set the camera to that size, "
                "or resize: true in the robot's file."
            )
        return top, left, cut_height, cut_width

    def distortion(self, height: int, width: int) -> str:
        """Describe how scaling an image of that size changes its aspect ratio; "" if unchanged."""
        _, _, cut_height, cut_width = self.box(height, width)
        aspect = cut_width / cut_height
        wanted = self.width / self.height
        if abs(aspect / wanted - 1.0) <= SQUEEZED:
            return ""
        side = min(cut_height * self.width, cut_width * self.height)
        height = side // self.width
        width = side // self.height
        return (
            f"resize squeezes {cut_width} x {cut_height} pixels (aspect {aspect:.2f}) into "
            f"the policy's {self.width} x {self.height} ({wanted:.2f}); "
            f"if training did not do this, crop to about {width} x {height} in the robot's file"
        )


@dataclass(frozen=True)
class CameraImage:
    """An image whose header is validated and whose pixels are not decoded yet.

    Attributes:
        stamp: Time at which it was taken [s].
        encoding: "rgb8", "bgr8", "jpeg" or "png".
        height: [px].
        width: [px].
        step: Bytes of a row; 0 if it is compressed.
        data: The serialized message that contains it.
        begin: Offset of its first byte in `data`.
        end: Offset behind its last byte.
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
        """Whether both have the same bytes; the comparison stops at the first difference."""
        if other is None or self.end - self.begin != other.end - other.begin:
            return False
        theirs = memoryview(other.data)[other.begin : other.end]
        return self.data.startswith(theirs, self.begin, self.end)

    def pixels(self, view: View | None = None) -> NDArray[np.uint8]:
        """Return the pixels (H, W, 3), red first, of the part in `view`; without a view all pixels.

        `ObservationError`: The data cannot be decoded, or do not fit the view.
        """
        view = view or View(self.height, self.width)
        try:
            return self._raw(view) if self.encoding in ENCODINGS else self._decoded(view)
        except ObservationError:
            raise
        except Exception as error:  # Pillow raises about ten types of errors on damaged files
            raise _unreadable(self.encoding, self.end - self.begin, short(error)) from error

    @property
    def _bytes(self) -> memoryview:
        return memoryview(self.data)[self.begin : self.end]

    def _raw(self, view: View) -> NDArray[np.uint8]:
        box = view.box(self.height, self.width)
        top, left, height, width = box
        data = np.frombuffer(self._bytes, np.uint8)
        if (height, width) == (view.height, view.width):  # no scaling, so no Pillow
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
            if problem:  # the message's header gave another size
                raise ObservationError(problem)
            box = view.box(image.height, image.width)
            _, _, height, width = box
            scale = 1.0
            if self.encoding == JPEG and (height, width) != (view.height, view.width):
                # Decode at a half, a quarter or an eighth of the size if that is enough: 4 ms
                # instead of 12 for 1920 x 1080 pixels that become 96 x 96.
                enough = (
                    math.ceil(_OVERSAMPLING * view.width * image.width / width),
                    math.ceil(_OVERSAMPLING * view.height * image.height / height),
                )
                full = image.width
                drafted = image.draft("RGB", enough)
                scale = drafted[1][2] / full if drafted else 1.0
            return _scaled(image if image.mode == "RGB" else image.convert("RGB"), view, box, scale)


def _scaled(image: PillowImage.Image, view: View, box: Box, scale: float) -> NDArray[np.uint8]:
    """Return the `box` of an image at the view's size; the image is already scaled by `scale`."""
    from PIL import Image as PillowImage

    top, left, height, width = box
    right = left + width
    bottom = top + height
    part = (left * scale, top * scale, right * scale, bottom * scale)
    if scale == 1.0 and image.size != (width, height):  # `resize` would read beyond its box
        image = image.crop((left, top, right, bottom))
        part = (0.0, 0.0, float(width), float(height))
    size = (view.width, view.height)
    if image.size == size:
        return np.asarray(image)
    return np.asarray(image.resize(size, PillowImage.Resampling.BILINEAR, box=part))


@dataclass(frozen=True)
class Shown:
    """A camera image for a policy, and the view that selects its part."""

    image: CameraImage
    view: View

    def pixels(self) -> NDArray[np.uint8]:
        """Decode the image; as `CameraImage.pixels`."""
        return self.image.pixels(self.view)


def decode(observation: Mapping[str, Any]) -> tuple[dict[str, Any], Seen]:
    """Return the observation with pixels in place of `Shown` images, and the result of decoding.

    The observation then lacks bad images.
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
        few = pixels[::4, ::4]  # for most images this comparison is enough
        if (few == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all():
            blank.append(feature)
    return decoded, Seen(problems, tuple(blank), time.monotonic() - started)


class _Reader:
    """Reads the fields of a serialized message in order.

    `ObservationError`: The message is not CDR, or ends too early.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < 4 or data[0] or data[1] not in (0, 1):
            raise ObservationError(
                f"The message is serialized as {data[:2].hex() or 'nothing'}; "
                "only CDR (0000, 0001) is supported. "
                "Use a middleware that sends CDR, such as Fast DDS, Cyclone DDS or Zenoh."
            )
        self._order = "<" if data[1] else ">"
        self._data = data
        self.at = 4

    def number(self, kind: str = "I") -> int:
        """Read a number of 4 bytes, or of one byte with `kind` "B"."""
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
        """Read a sequence of bytes at the end of the message; return its begin and end."""
        size = self.number()
        have = len(self._data) - self.at
        if not 0 <= have - size < 4:
            raise ObservationError(f"The message has {have} bytes of image but declares {size}.")
        return self.at, self.at + size

    def stamp(self) -> float:
        """Read the message's header and return its stamp [s]; skip the frame."""
        stamp = self.number("i") + 1e-9 * self.number()
        self.text()
        return stamp

    def _need(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise ObservationError(f"The message ends within its header ({len(self._data)} bytes).")


def read_image(message: bytes) -> CameraImage:
    """Return the image of a serialized `sensor_msgs/Image`.

    `ObservationError`: The encoding is neither rgb8 nor bgr8, there are no pixels, or `step` and
    `height` contradict the data.
    """
    reader = _Reader(message)
    stamp = reader.stamp()
    height = reader.number()
    width = reader.number()
    encoding = reader.text()
    reader.number("B")  # is_bigendian: irrelevant for single bytes
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
    """Return the image of a serialized `sensor_msgs/CompressedImage`; only the header is read.

    `ObservationError`: The data are neither JPEG nor PNG, have no pixels, or have more than
    `MAX_PIXELS`.
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
    problem = _size_problem(*size) if size else "its header is neither JPEG nor PNG"
    if size is None or problem:
        raise _unreadable(told, end - begin, problem)
    return CameraImage(stamp, kind, *size, 0, message, begin, end)


def message_stamp(message: bytes) -> float | None:
    """Return the stamp of a serialized message [s]; None if it cannot be read."""
    try:
        return _Reader(message).stamp()
    except ObservationError:
        return None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Return height and width from the frame header of a JPEG; None without one."""
    for marker, begin in _jpeg_segments(data):
        # Start of frame; three of these sixteen markers, C4, C8 and CC, mean something else.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if begin + 7 > len(data):
                return None
            height, width = struct.unpack_from(">HH", data, begin + 3)
            return height, width
    return None


def _jpeg_segments(data: memoryview) -> Iterator[tuple[int, int]]:
    """Iterate over the header's segments: marker, and offset of the segment's length."""
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
    """Return why an image of that size is not decoded; "" if it is."""
    if not height or not width:
        return f"it is empty: {width} x {height} pixels"
    if width * height > MAX_PIXELS:
        return f"it has {width} x {height} pixels, more than {MAX_PIXELS}"
    return ""


def _unreadable(kind: str, size: int, reason: str) -> ObservationError:
    what = f"The compressed image (format {shown(kind)}, {size} bytes)"
    return ObservationError(f"{what} cannot be read: {reason}. Send JPEG or PNG.")
