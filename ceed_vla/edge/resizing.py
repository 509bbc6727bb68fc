"""Resizing of images: with numpy as torch does it on a CPU, and with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

_KEPT = 16  # pairs of sizes whose weights are kept


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image (3, H, W) to (3, `side`, `side`), bilinear with antialiasing, as
    ``torch.nn.functional.interpolate(antialias=True)`` does.

    It sums the few pixels that matter, because the threads of a matrix product would disturb those
    of the graphs.
    """
    for axis in (1, 2):
        if image.shape[axis] != side:
            image = _along(image, axis, side)
    return image


def _along(image: np.ndarray, axis: int, side: int) -> np.ndarray:
    """Resize one axis of an image (3, H, W), heights (1) or widths (2)."""
    shape = [*image.shape]
    shape[axis] = side
    total: np.ndarray = np.zeros(shape, np.float32)
    for pixels, weights in _taps(image.shape[axis], side):
        total += image.take(pixels, axis) * (weights[:, None] if axis == 1 else weights)
    return total


@lru_cache(_KEPT)
def _taps(size: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of input pixels (`side`,) and their weights (`side`,) float32, whose products sum up to
    the output pixels.
    """
    # In float32, with the same roundings as torch.
    scale = np.float32(size / side)
    support = max(scale, np.float32(1))
    half = np.float32(0.5)
    centre = scale * (np.arange(side, dtype=np.float32) + half)
    first = np.maximum((centre - support + half).astype(np.int64), 0)
    end = np.minimum((centre + support + half).astype(np.int64), size)
    steps = np.arange((end - first).max())[:, None]  # (taps, 1)
    away = (steps.astype(np.float32) + first - centre + half) / support
    weight = np.where(first + steps < end, np.maximum(1 - np.abs(away), 0), 0).astype(np.float32)
    weight /= weight.sum(0)
    return list(zip(np.minimum(first + steps, size - 1), weight, strict=True))


def resized_bytes(image: np.ndarray, sizes: Sequence[Sequence[int]], resample: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to each (height, width) of `sizes` in turn, with Pillow.

    Args:
        image: The image.
        sizes: Heights and widths.
        resample: Number of Pillow's filter.
    """
    picture = Image.fromarray(image)
    for height, width in sizes:
        picture = picture.resize((width, height), Image.Resampling(resample))
    return np.asarray(picture)
