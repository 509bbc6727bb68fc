"""Validation and conversion of camera images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ceed_vla.errors import ObservationError


def check_images(images: Mapping[str, Tensor]) -> None:
    """Raise `ObservationError` unless images are floats in [0, 1], and not NaN.

    This takes one pass over each image, and one transfer to the host for all.
    """
    for name, image in images.items():
        if not image.is_floating_point() or not image.numel():
            raise ObservationError(
                f"{name} is {tuple(image.shape)} {image.dtype}; images must be floats in [0, 1] or "
                "uint8."
            )
    ends = [torch.stack(image.aminmax()).float() for image in images.values()]  # NaN stays NaN
    for name, (least, most) in zip(images, torch.stack(ends).tolist() if ends else (), strict=True):
        if not (least >= 0 and most <= 1):
            raise ObservationError(
                f"{name} has values from {least:g} to {most:g}; images must be in [0, 1]."
            )


def check_model_images(images: Mapping[str, Tensor]) -> None:
    """As `check_images`, for images that a model reads as they are: they must be float32."""
    check_images(images)
    for name, image in images.items():
        if image.dtype != torch.float32:
            raise ObservationError(f"{name} is {image.dtype}; expected torch.float32 in [0, 1].")


def camera_pixels(
    observation: Mapping[str, Any], camera: str, size: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Convert the images of a camera to bytes.

    Args:
        observation: The observation, with images (B, 3, H, W) of bytes or of floats in [0, 1].
        camera: Feature of the camera.
        size: Required (H, W) [px]; None for any size.

    Returns:
        (B, H, W, 3).

    Raises:
        ObservationError: The camera is missing, or its images have another size, mode or range.
    """
    if camera not in observation:
        present = (
            ", ".join(sorted(key for key in observation if key.startswith("observation.")))
            or "none"
        )
        raise ObservationError(f"The observation lacks {camera!r}; it has {present}.")
    image = observation[camera]
    found = tuple(image.shape) if isinstance(image, Tensor) else ()
    if len(found) != 4 or found[1] != 3 or 0 in found or (size and found[2:] != tuple(size)):
        height, width = size or ("height", "width")
        raise ObservationError(
            f"{camera} is {found or type(image).__name__}; expected RGB images (B, 3, {height}, "
            f"{width}), channels "
            f"first{', in the size that the policy was trained with' if size else ''}."
        )
    if image.dtype != torch.uint8:
        check_images({camera: image})
        image = (image.float() * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = image.permute(0, 2, 3, 1).cpu().numpy()
    return pixels
