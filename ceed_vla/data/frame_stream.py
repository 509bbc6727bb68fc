"""Images that are decoded when a batch asks for them: of data sets whose decoded images would not fit on the disk."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.images import WINDOW, ImageReader
from ceed_vla.fields import check_fields, ranged


@dataclass
class StreamingConfig:
    """Which data sets are decoded into files once, and which again and again as they are drawn.

    Attributes:
        above_gb: A data set is streamed if its decoded images take more [GB]; 0 streams all.
        memory_gb: Decoded images of streamed sets that a process holds [GB]. Batches are drawn from what fits in half
            of it: more mixes better, and another value draws other batches.
    """

    above_gb: float = ranged(100.0, "[0, 1e9]")
    memory_gb: float = ranged(0.5, "(0, 1e6]")

    def __post_init__(self) -> None:
        check_fields(self, "streaming.")


class _Windows:
    """The decoded windows of this process that were used last; one for all data sets, so that their sum is bounded."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[StreamedImages, int], NDArray[np.uint8]] = OrderedDict()
        self.bytes = 0

    def get(
        self, key: tuple[StreamedImages, int], decode: Callable[[], NDArray[np.uint8]], most: float
    ) -> NDArray[np.uint8]:
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        images = decode()
        self.held[key], self.bytes = images, self.bytes + images.nbytes
        while self.bytes > most and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1].nbytes
        return images


_windows = _Windows()


class StreamedImages:
    """Images of one camera (N, H, W, 3), read by index as an array is.

    Args:
        reader: Decodes them.
        camera: Which.
        memory: Decoded images that the process may hold [bytes].

    Attributes:
        shape: (N, H, W, 3).
        edges: First frame of every window, and one past the last frame (W + 1,).
    """

    def __init__(self, reader: ImageReader, camera: str, memory: float) -> None:
        self.reader, self.camera, self.memory = reader, camera, memory
        self.edges = reader.edges
        self.shape = (int(self.edges[-1]), *reader.info.cameras[camera])

    def __getitem__(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, H, W, 3) of the frames (B,).

        Raises:
            DatasetError: Images that cannot be decoded, or have another size.
        """
        found = np.empty((len(frames), *self.shape[1:]), np.uint8)
        windows = np.searchsorted(self.edges, frames, side="right") - 1
        for window in np.unique(windows).tolist():
            own = windows == window
            found[own] = self._window(window)[frames[own] - self.edges[window]]
        return found

    def _window(self, window: int) -> NDArray[np.uint8]:
        first, end = self.edges[window : window + 2].tolist()
        return _windows.get(
            (self, window), lambda: np.stack(list(self.reader.read(self.camera, first, end))), self.memory
        )


def open_windows(cameras: dict[str, StreamedImages]) -> int:
    """Windows, all cameras of each, that fit in half of the memory: the other half is for what is read out of turn."""
    frame = sum(math.prod(images.shape[1:]) for images in cameras.values())
    memory = next(iter(cameras.values())).memory
    return int(memory / 2 / (WINDOW * frame))
