"""Resizing of images: with numpy as torch does it on a CPU, and with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ceed_vla.errors import ConfigError

_KEPT = 16  # pairs of sizes whose weights are kept


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image (3, H, W) to (3, `side`, `side`), bilinear with antialiasing, as
    ``torch.nn.functional.interpolate(antialias=True)`` does.
    """
    _, height, width = image.shape
    if height != side:
        image = _bilinear_weights(height, side) @ image
    if width != side:
        image = image @ _bilinear_weights(width, side).T
    return image


@lru_cache(_KEPT)
def _bilinear_weights(size: int, side: int) -> np.ndarray:
    """Weights (`side`, `size`) float32 of the input pixels for every output pixel."""
    # In float32, with the same roundings as torch.
    scale = np.float32(size / side)
    support = max(scale, np.float32(1))
    half = np.float32(0.5)
    centre = scale * (np.arange(side, dtype=np.float32)[:, None] + half)  # (side, 1)
    first = np.maximum((centre - support + half).astype(np.int64), 0)
    end = np.minimum((centre + support + half).astype(np.int64), size)
    pixel = np.arange(size)  # (size,)
    away = ((pixel - first).astype(np.float32) + first - centre + half) / support
    weight = np.maximum(1 - np.abs(away), 0)
    weight = np.where((pixel >= first) & (pixel < end), weight, 0).astype(np.float32)
    return weight / weight.sum(1, keepdims=True)


def resized_bytes(image: np.ndarray, sizes: Sequence[Sequence[int]], resample: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to each (height, width) of `sizes` in turn, with Pillow.

    Args:
        image: The image.
        sizes: Heights and widths.
        resample: Number of Pillow's filter.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "This export's images need Pillow; install it: pip install pillow"
        ) from error

    picture = Image.fromarray(image)
    for height, width in sizes:
        picture = picture.resize((width, height), Image.Resampling(resample))
    return np.asarray(picture)
