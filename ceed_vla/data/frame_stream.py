"""Images that are decoded when a batch asks for them: of data sets whose decoded images would not
fit on the disk.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.images import WINDOW, ImageReader
from ceed_vla.fields import Checked, ranged


@dataclass
class StreamingConfig(Checked, prefix="streaming."):
    """Which data sets are decoded into files once, and which again and again as they are drawn.

    Attributes:
        above_gb: A data set is streamed if its decoded images take more [GB]; 0 streams all.
        memory_gb: Decoded images of streamed sets that a process holds [GB]. Batches are drawn from
            what fits in half of it: more mixes better, and another value draws other batches.
    """

    above_gb: float = ranged(100.0, "[0, 1e9]")
    memory_gb: float = ranged(0.5, "(0, 1e6]")


class StreamedImages:
    """Images of one camera (N, H, W, 3), read by index as an array is.

    A process may hold `memory` bytes of decoded images; so many windows of all cameras fit
    `together` in half of it, the rest is for what is read out of turn.
    """

    def __init__(self, reader: ImageReader, camera: str, memory: float) -> None:
        self.reader = reader
        self.camera = camera
        self.memory = memory
        self.shape = (reader.info.frames, *reader.info.cameras[camera])
        self.together = int(
            memory / 2 / WINDOW / sum(math.prod(shape) for shape in reader.info.cameras.values())
        )

    def __getitem__(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, H, W, 3) of the frames (B,)."""
        found = np.empty((len(frames), *self.shape[1:]), np.uint8)
        windows = np.searchsorted(self.reader.edges, frames, side="right") - 1
        for window in np.unique(windows).tolist():
            own = windows == window
            found[own] = self._window(window)[frames[own] - self.reader.edges[window]]
        return found

    def _window(self, window: int) -> NDArray[np.uint8]:
        key = (self, window)
        if key not in _held:
            first, end = self.reader.edges[window : window + 2].tolist()
            _held[key] = np.stack(list(self.reader.read(self.camera, first, end)))
            while len(_held) > 1 and sum(images.nbytes for images in _held.values()) > self.memory:
                _held.popitem(last=False)
        _held.move_to_end(key)
        return _held[key]


# The windows of this process that were used last; of all data sets, so that their sum is bounded.
_held: OrderedDict[tuple[StreamedImages, int], NDArray[np.uint8]] = OrderedDict()
