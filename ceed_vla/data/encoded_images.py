"""Encode the images of a camera as PNG files in memory while they arrive."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import PIL.Image

from ceed_vla.data.statistics import PixelCounts, Statistics
from ceed_vla.errors import DatasetError

PNG_LEVEL = 3  # on rendered scenes, smaller than level 1 and as fast
_COUNTED = 10  # every so many images, one is counted for the statistics ...
_SPARSE = 4  # ... with every so many of its rows and columns


@dataclass(frozen=True)
class EncodedImages:
    """The images of one camera in one episode.

    Attributes:
        files: PNG files (T,).
        shape: Of each image (H, W, 3).
        statistics: Of their pixels, see `image_statistics`.
    """

    files: list[bytes]
    shape: tuple[int, ...]
    statistics: Statistics

    @property
    def frames(self) -> int:
        """Number of images."""
        return len(self.files)


class ImageEncoder:
    """Encodes images at once; the counterpart of `VideoEncoder`."""

    def __init__(self) -> None:
        self._files: list[bytes] = []
        self._shape: tuple[int, ...] = ()
        self._counts = PixelCounts()

    def add(self, pixels: np.ndarray) -> None:
        """Append an image (H, W, 3) uint8."""
        if len(self._files) % _COUNTED == 0:
            self._counts.add(pixels[None, ::_SPARSE, ::_SPARSE])
        self._shape = pixels.shape
        self._files.append(png(pixels))

    def close(self) -> EncodedImages:
        """Return the images.

        Raises:
            DatasetError: There is none.
        """
        if not self._files:
            raise DatasetError("A camera has no image.")
        return EncodedImages(self._files, self._shape, self._counts.statistics())

    def cancel(self) -> None:
        """Drop the images."""
        self._files = []


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
