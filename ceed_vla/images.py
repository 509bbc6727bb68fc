"""What every image that a policy is shown must be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ceed_vla.errors import ObservationError


def check_images(images: Mapping[str, Tensor]) -> None:
    """Check that images are floats in [0, 1]; one pass over each, and one transfer for all.

    Raises:
        ObservationError: Another type, NaN, infinity, or values outside.
    """
    for name, image in images.items():
        if not image.is_floating_point() or not image.numel():
            raise ObservationError(
                f"{name} is {tuple(image.shape)} {image.dtype}; images are floats in [0, 1] or uint8."
            )
    ends = [torch.stack(image.aminmax()).float() for image in images.values()]  # NaN stays NaN
    for name, (least, most) in zip(images, torch.stack(ends).tolist() if ends else (), strict=True):
        if not (least >= 0 and most <= 1):
            raise ObservationError(f"{name} has values from {least:g} to {most:g}; images lie in [0, 1].")
