"""Images as JPEG or PNG, for slow networks. Pillow is imported when an image needs it."""

from __future__ import annotations

import io
import re
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ceed_vla.serving.arrays import WireError
from ceed_vla.serving.request_reader import LARGEST_SIDE

FORMATS = ("jpeg", "png")
_BEGINS = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_MODES = ("RGB", "L", "P", "RGBA")
# Every scan of a JPEG costs time for all pixels; cameras write 1, progressive ones about 10.
_MOST_PARTS = 200
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")


def jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """The JPEG of an image (H, W, 3)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


class EncodedImage:
    """An image of a message that is decoded later, beside the event loop.

    Args:
        data: The file.
        name: What it is called in errors.
        form: Its format, one of `FORMATS`.

    Raises:
        WireError: It is not of this format, or has so many parts that decoding them takes long.
    """

    def __init__(self, data: bytes, name: str, form: str = "jpeg") -> None:
        self._data, self._name, self._form = data, name, form.upper()
        if not data.startswith(_BEGINS[form]):
            raise WireError(f"{name} has {len(data)} bytes that are no {self._form}.")
        parts = _jpeg_parts(data) if form == "jpeg" else _png_parts(data)
        if parts > _MOST_PARTS:
            raise WireError(f"{name} is a {self._form} of more than {_MOST_PARTS} parts.")

    def pixels(self) -> NDArray[np.uint8]:
        """Its pixels (H, W, 3).

        Raises:
            WireError: It is too large, has other pixels than 8-bit colours or greys, or is damaged.
        """
        from PIL import Image

        name = self._name
        try:
            with Image.open(io.BytesIO(self._data), formats=(self._form,)) as image:
                if max(image.size) > LARGEST_SIDE:  # before its pixels take memory
                    raise WireError(
                        f"{name} is an image of {image.width} x {image.height} px; at most "
                        f"{LARGEST_SIDE} px a side are read."
                    )
                if image.mode not in _MODES:
                    raise WireError(
                        f"{name} has pixels of the mode {image.mode}; it must be one of "
                        f"{', '.join(_MODES)}."
                    )
                return np.asarray(image.convert("RGB"))
        except WireError:
            raise
        except Exception as error:  # Pillow has many types for damaged files
            kind = type(error).__name__
            raise WireError(
                f"{name} has {len(self._data)} bytes that are no {self._form} ({kind})."
            ) from error


def _jpeg_parts(data: bytes) -> int:
    """An upper bound of the scans and other segments, counted to one more than `_MOST_PARTS`; the
    pixels' bytes contain no markers.
    """
    return sum(1 for _ in islice(_SEGMENT.finditer(data), _MOST_PARTS + 1))


def _png_parts(data: bytes) -> int:
    """Number of chunks, counted to one more than `_MOST_PARTS`."""
    place, parts = len(_BEGINS["png"]), 0
    while place + 8 <= len(data) and parts <= _MOST_PARTS:
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        parts += 1
    return parts
