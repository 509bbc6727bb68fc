"""Encode the images of a camera as a video while they arrive."""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from lerobot.configs.video import RGBEncoderConfig

from ceed_vla.data.statistics import PixelCounts, Statistics
from ceed_vla.errors import DatasetError

# H.264 in the faster of its usual settings: 6 ms of a core for 640 x 480 pixels, AV1 takes 17.
CODECS = {
    "h264": {"vcodec": "h264", "preset": "superfast"},
    "av1": {"vcodec": "libsvtav1"},
}
_QUEUE = 60  # images that wait for the encoder; then `add` waits
_COUNTED = 10  # every so many images, one is counted for the statistics ...
_SPARSE = 4  # ... with every so many of its rows and columns


def encoder_settings(codec: str) -> RGBEncoderConfig:
    """LeRobot's settings of a codec in `CODECS`."""
    settings: dict[str, Any] = CODECS[codec]
    return RGBEncoderConfig(**settings)


@dataclass(frozen=True)
class EncodedVideo:
    """The video of one camera in one episode.

    Attributes:
        path: MP4 file.
        frames: Number of its images.
        statistics: Of their pixels, see `image_statistics`.
    """

    path: Path
    frames: int
    statistics: Statistics


class VideoEncoder:
    """Encodes images in a thread of its own, which the encoder's library lets run beside others.

    Args:
        path: MP4 file to write, in a folder that exists.
        fps: Images per second.
        codec: One of `CODECS`.
    """

    def __init__(self, path: Path, fps: int, codec: str) -> None:
        self.path = path
        self._fps = fps
        self._settings = encoder_settings(codec)
        self._images: queue.Queue[np.ndarray | None] = queue.Queue(_QUEUE)
        self._counts = PixelCounts()
        self._frames = 0
        self._error: Exception | None = None
        self._cancelled = False
        self._ended = False  # the thread has taken the None behind the last image
        self._thread = threading.Thread(target=self._run, name=f"encode {path.name}", daemon=True)
        self._thread.start()

    def add(self, pixels: np.ndarray) -> None:
        """Append an image (H, W, 3) uint8; waits if the encoder is `_QUEUE` images behind.

        Raises:
            DatasetError: An earlier image could not be encoded.
            OSError: The disk is full.
        """
        self._raise()
        self._images.put(pixels)

    def close(self) -> EncodedVideo:
        """Finish the file.

        Raises:
            DatasetError: There is no image, or one could not be encoded.
            OSError: The disk is full.
        """
        self._images.put(None)
        self._thread.join()
        self._raise()
        if not self._frames:
            raise DatasetError(f"{self.path.name} has no image.")
        return EncodedVideo(self.path, self._frames, self._counts.statistics())

    def cancel(self) -> None:
        """Stop, and remove the file."""
        self._cancelled = True
        self._images.put(None)
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _raise(self) -> None:
        """Raise the error of the thread, if there is one."""
        if self._error is None:
            return
        number = getattr(self._error, "errno", None)
        if isinstance(number, int) and number > 0:  # FFmpeg's own errors are negative
            raise OSError(number, str(self._error)) from self._error
        raise DatasetError(f"{self.path.name} cannot be encoded: {self._error}") from self._error

    def _run(self) -> None:
        try:
            self._encode()
        except Exception as error:
            self._error = error
            while not self._ended:
                self._next()  # `add`, `close` and `cancel` must not wait for ever

    def _next(self) -> np.ndarray | None:
        """The next image; None behind the last one."""
        pixels = self._images.get()
        self._ended = pixels is None
        return pixels

    def _encode(self) -> None:
        av.logging.set_libav_level(av.logging.ERROR)  # LeRobot restores FFmpeg's own messages
        container = av.open(str(self.path), "w")
        stream = None
        try:
            while (pixels := self._next()) is not None and not self._cancelled:
                if stream is None:
                    stream = self._start(container, pixels)
                self._encode_one(container, stream, pixels)
            if stream is not None and not self._cancelled:
                container.mux(stream.encode())
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the cause
                container.close()
            raise
        container.close()

    def _start(self, container: Any, pixels: np.ndarray) -> Any:
        height, width = pixels.shape[:2]
        options = self._settings.get_codec_options(1, as_strings=True)
        stream = container.add_stream(self._settings.vcodec, self._fps, options=options)
        stream.pix_fmt = self._settings.pix_fmt
        stream.height = height
        stream.width = width
        stream.time_base = Fraction(1, self._fps)
        return stream

    def _encode_one(self, container: Any, stream: Any, pixels: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = self._frames
        frame.time_base = Fraction(1, self._fps)
        container.mux(stream.encode(frame))
        if self._frames % _COUNTED == 0:
            self._counts.add(pixels[None, ::_SPARSE, ::_SPARSE])
        self._frames += 1
