"""Decode images when a batch needs them, for datasets whose decoded images do not fit on disk."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.images import SPAN, ImageReader
from ceed_vla.fields import Checked, ranged


@dataclass
class StreamingConfig(Checked, prefix="streaming."):
    """Which datasets are decoded into files once, and which are streamed: decoded when drawn.

    Attributes:
        above_gb: Size of the decoded images above which a dataset is streamed [GB]; 0 streams all.
        memory_gb: Decoded images of streamed datasets in the memory of a process [GB]. Batches are
            drawn from the frames that fit in half of it: a larger value mixes them better, and
            every value draws different batches.
    """

    above_gb: float = ranged(100.0, "[0, 1e9]")
    memory_gb: float = ranged(0.5, "(0, 1e6]")


class StreamedImages:
    """Images of one camera (N, H, W, 3), indexed like an array.

    A process may hold `memory` bytes of decoded images. `together` is the number of spans of all
    cameras that fit in half of it; the other half is for frames that are read out of order.
    """

    def __init__(self, reader: ImageReader, camera: str, memory: float) -> None:
        self.reader = reader
        self.camera = camera
        self.memory = memory
        self.shape = (reader.info.frames, *reader.info.cameras[camera])
        self.together = int(
            memory / 2 / SPAN / sum(math.prod(shape) for shape in reader.info.cameras.values())
        )

    def __getitem__(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (B, H, W, 3) of the frames (B,)."""
        found = np.empty((len(frames), *self.shape[1:]), np.uint8)
        spans = np.searchsorted(self.reader.edges, frames, side="right") - 1
        for span in np.unique(spans).tolist():
            own = spans == span
            found[own] = self._span(span)[frames[own] - self.reader.edges[span]]
        return found

    def _span(self, span: int) -> NDArray[np.uint8]:
        key = (self, span)
        if key not in _held:
            first, end = self.reader.edges[span : span + 2].tolist()
            _held[key] = np.stack(list(self.reader.read(self.camera, first, end)))
            while len(_held) > 1 and sum(images.nbytes for images in _held.values()) > self.memory:
                _held.popitem(last=False)
        _held.move_to_end(key)
        return _held[key]


# The spans of this process that were used last, of all datasets, so that their sum is limited.
_held: OrderedDict[tuple[StreamedImages, int], NDArray[np.uint8]] = OrderedDict()
