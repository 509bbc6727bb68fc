"""OpenVLA's image transform: one resized, cropped and normalised copy of the image for every vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ceed_vla.errors import CheckpointError

STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
MODES = {"nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"}


class OpenVLAImages:
    """The image processor of an OpenVLA folder.

    Args:
        settings: preprocessor_config.json.
        file: Where they come from, for messages.

    Raises:
        CheckpointError: Settings that are missing or unknown.
    """

    def __init__(self, settings: dict[str, Any], file: Path | str) -> None:
        try:
            self.sizes = [[int(v) for v in size[-2:]] for size in settings["input_sizes"]]
            self.means, self.stds = settings["means"], settings["stds"]
            modes = settings.get("interpolations") or ["bicubic"] * len(self.sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} needs input_sizes, means and stds, one entry a vision tower ({type(error).__name__}: {error})."
            ) from error
        self.strategy = settings.get("image_resize_strategy", "resize-naive")
        if self.strategy not in STRATEGIES:
            raise CheckpointError(
                f"{file}: image_resize_strategy is {self.strategy!r}; it may be {', '.join(STRATEGIES)}."
            )
        lengths = {len(part) for part in (self.sizes, self.means, self.stds, modes)}
        unknown = [mode for mode in modes if mode not in MODES]
        if len(lengths) != 1 or unknown or len({tuple(size) for size in self.sizes}) != 1:
            raise CheckpointError(
                f"{file}: input_sizes {self.sizes}, means, stds and interpolations {modes} must have one entry a "
                f"vision tower, equal sizes, and interpolations out of {', '.join(sorted(MODES))}."
            )
        self.modes = [InterpolationMode(mode) for mode in modes]

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels (3 * towers, S, S) float32 of one picture of any size."""
        image = image.convert("RGB")
        if self.strategy == "letterbox":
            image = self._letterboxed(image)
        parts = []
        for size, mode, mean, std in zip(self.sizes, self.modes, self.means, self.stds, strict=True):
            # "resize-naive" ignores the aspect ratio, the others scale the shorter side.
            target = size if self.strategy == "resize-naive" else [size[-1]]
            resized = transforms.resize(image, target, mode, antialias=True)
            pixels = transforms.to_tensor(transforms.center_crop(resized, size))
            parts.append(transforms.normalize(pixels, mean, std))
        return torch.vstack(parts)

    def _letterboxed(self, image: Image.Image) -> Image.Image:
        """The picture in the middle of a square of the first tower's mean colour."""
        width, height = image.size
        across, down = int((max(width, height) - width) / 2), int((max(width, height) - height) / 2)
        colour = [int(255 * value) for value in self.means[0]]
        return transforms.pad(image, [across, down, across, down], fill=colour)
